"""The verb `search`: what it prints, what it writes, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_bench.cli import main
from moe_bench.spec.load import Loader

SMALL = (
    "search", "qwen3_30b_a3b", "--system", "h100_sxm", "--num-gpus", "16", "--global-batch", "256",
    "--micro-batch", "1,2", "--top", "3", "--set", "parallel.tensor=1", "--set", "parallel.pipeline=2",
    "--set", "parallel.virtual_pipeline=4", "--set", "dispatch.dispatcher=deepep",
    "--set", "parallel.expert=8",
)  # fmt: skip


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, object], Path]:
    folder = tmp_path_factory.mktemp("found")
    code = [sys.executable, "-m", "moe_bench", *SMALL, "--json", "--write", str(folder)]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    return json.loads(done.stdout), folder


def test_the_json_says_what_became_of_every_layout(printed: tuple[dict[str, object], Path]) -> None:
    data, _ = printed
    numbers = {name: value for name, value in data.items() if name.startswith("num_")}
    legal = sum(
        int(numbers[name])
        for name in (
            "num_over_memory_bound", "num_slower_by_bound", "num_fitting", "num_too_close_to_say",
            "num_not_fitting",
        )
    )  # fmt: skip
    assert legal == numbers["num_legal"]
    assert numbers["num_legal"] + sum(data["refused"].values()) == numbers["num_generated"]
    assert len(data["ranked"]) == 3


def test_the_terms_of_every_result_sum_to_its_step(printed: tuple[dict[str, object], Path]) -> None:
    data, _ = printed
    for found in (*data["ranked"], *data["too_close_to_say"], *data["pareto"]):
        assert sum(found["terms"].values()) == pytest.approx(found["step_s"], rel=1e-9)


def test_the_winners_are_written_as_recipes_that_pass_check(
    printed: tuple[dict[str, object], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data, folder = printed
    assert len(data["written"]) == 3
    assert main(["check", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == "3 recipes, all legal"
    loader = Loader(root=Path("recipes").resolve())
    for path, found in zip(map(Path, data["written"]), data["ranked"], strict=True):
        recipe = loader.recipe(path)
        assert recipe.parallel.expert == found["layout"]["expert"]
        comment = path.read_text().replace("\n# ", " ")
        assert "`moe-bench search qwen3_30b_a3b --system h100_sxm --num-gpus 16" in comment
        assert "--set parallel.tensor=1" in comment


def test_a_written_recipe_is_projected_as_it_was_found(
    printed: tuple[dict[str, object], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data, _ = printed
    assert main(["project", data["written"][0], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step_s"] == pytest.approx(
        data["ranked"][0]["step_s"], rel=1e-9
    )


def test_people_read_the_space_the_counts_and_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL]) == 0
    out = capsys.readouterr().out
    for text in (
        "PP x VPP: 2 x 4",
        "layouts generated",
        "were simulated",
        "why the first beats the second by",
    ):
        assert text in out
    assert "memory against speed" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing",), "there is no model 'nothing'"),
        (("qwen3_30b_a3b", "--micro-batch", "0"), "--micro-batch 0: write whole numbers"),
        (("qwen3_30b_a3b", "--set", "parallel.expert=7"), "break the rule experts_per_rank"),
        (
            ("deepseek_v3", "--global-batch", "64", "--set", "parallel.tensor=1"),
            "no layout of deepseek_v3 fits 16",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", *arguments, "--system", "h100_sxm", "--num-gpus", "16"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_search_needs_neither_torch_nor_pandas_nor_scipy() -> None:
    code = (
        "import sys; from moe_bench.cli import main; "
        f"assert main({[*SMALL, '--json']!r}) == 0; "
        "heavy = {'torch', 'pandas', 'scipy', 'megatron'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
