"""Names on the command line stand for engines, one or several."""

import pytest

from moe_bench.errors import BadInputError
from moe_bench.harness.layer.peers.registry import all_engines, chosen_engines
from tests.harness.layer.peers.cases import host

OURS = ("torch_native", "quack", "transformer_engine", "sequential")


def test_without_names_all_engines_stand_ours_first_and_the_textbook_last() -> None:
    names = list(chosen_engines(host(), ()))
    assert names == list(all_engines(host()))
    assert tuple(names[: len(OURS)]) == OURS
    assert names[-3:] == ["deepspeed", "megablocks", "textbook"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("textbook", "sequential"), ["sequential", "textbook"]),
        (("hf_mixtral",), [f"hf_mixtral_{way}" for way in ("eager", "grouped_mm", "batched_mm", "sonicmoe")]),
        (
            ("hf_eager",),
            [
                f"hf_{model}_eager"
                for model in ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss")
            ],
        ),
    ],
)
def test_a_name_stands_for_one_engine_or_a_group(names: tuple[str, ...], expected: list[str]) -> None:
    assert list(chosen_engines(host(), names)) == expected


def test_hf_stands_for_every_block_in_every_way() -> None:
    assert len(chosen_engines(host(), ("hf",))) == 20


def test_a_name_that_nothing_has_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(
        BadInputError, match=r"peer tutel: no such engine; known are deepspeed, hf, .*textbook"
    ):
        chosen_engines(host(), ("textbook", "tutel"))
