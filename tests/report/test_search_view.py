"""What a search prints agrees with what it found."""

from dataclasses import replace

import pytest

from moe_bench.projection.evidence.grade import Grade
from moe_bench.projection.search.search import Found, SearchResult, search
from moe_bench.projection.step import Term
from moe_bench.report.search_view import counts_text, recompute_text, rules_text, space_rows, why_text
from moe_bench.spec.recipe import Recompute
from tests.projection.search_spaces import space_of

SPACE = space_of(
    "qwen3_30b_a3b",
    16,
    "parallel.tensor=1",
    "parallel.pipeline=1",
    "parallel.expert=16",
    global_batch_size=256,
)


@pytest.fixture(scope="module")
def result() -> SearchResult:
    return search(SPACE, num_wanted=3)


def with_terms(found: Found, **seconds: float) -> Found:
    terms = tuple(Term(name=name, seconds=value, grade=Grade.PRIOR) for name, value in seconds.items())
    projection = replace(found.projection, terms=terms, step_s=sum(seconds.values()))
    return replace(found, projection=projection)


def test_the_reason_names_the_largest_differences_first(result: SearchResult) -> None:
    one, two = result.ranked[:2]
    first = with_terms(one, experts=2.0, norms=1.0, host=0.5)
    second = with_terms(two, experts=5.0, norms=0.75, host=0.5, bubble=1.0)
    assert why_text([first, second]) == (
        "why the first beats the second by 3.750 s: "
        "3.000 s less experts, 1.000 s less bubble, 250 ms more norms"
    )


def test_a_lone_result_has_no_second_to_be_compared_with(result: SearchResult) -> None:
    assert why_text(result.ranked[:1]) == "there is no second one to compare the first with"


def test_the_counts_are_those_of_the_result(result: SearchResult) -> None:
    text = counts_text(result)
    for number in (result.num_generated, result.num_legal, result.num_simulated):
        assert f"{number:,}" in text


def test_the_most_frequent_rules_come_first(result: SearchResult) -> None:
    [(name, number), *_] = result.refused.most_common(1)
    assert rules_text(result).startswith(f"{name} ({number:,})")


def test_every_axis_is_stated() -> None:
    rows = dict(space_rows(SPACE))
    assert (rows["TP"], rows["ETP"]) == ("1", "1, 2, 4, 8")
    assert rows["CP"] == "1"
    assert rows["sharding"] == ("optimizer, FSDP optim, FSDP optim_grads, FSDP, FSDP x2, FSDP x4, FSDP x8")
    assert rows["EP"] == "16"
    assert rows["micro batch"] == "1, 2"
    assert rows["PP x VPP"] == "1 x 1; divisions of the layers: 1"
    assert rows["EP overlap"] == "off, on"
    assert rows["recompute"].startswith("none, ")


def test_recompute_is_its_modules_or_its_granularity() -> None:
    assert recompute_text(Recompute()) == "none"
    assert recompute_text(Recompute(granularity="full", num_layers=1)) == "full"
    assert recompute_text(Recompute(granularity="selective", modules=("mlp", "moe_act"))) == "mlp+moe_act"
