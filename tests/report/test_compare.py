"""Like is compared with like, and claims follow from samples of known answer."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from moe_bench.analysis.equivalence import BAND_FRACTION, Claim
from moe_bench.cli import main
from moe_bench.cli.read import BAND
from moe_bench.errors import BadInputError
from moe_bench.report.compare import compare, compare_within, compared_json, compared_view
from moe_bench.results.likeness import UnlikeRunsError
from moe_bench.results.store import write_record
from moe_bench.spec.scale import Plan
from tests.report.series import runs
from tests.results.records import RECIPE, full, record


def with_dispatcher(name: str) -> Plan:
    dispatch = RECIPE.dispatch.model_copy(update={"dispatcher": name})
    recipe = RECIPE.model_copy(update={"dispatch": dispatch})
    return full((f"dispatch.dispatcher={name}",)).model_copy(update={"recipe": recipe})


def test_the_verbs_and_the_claims_have_one_band() -> None:
    assert BAND == BAND_FRACTION


def test_equal_speeds_are_the_same() -> None:
    (pair,) = compare(runs(2.0, seed=1), runs(2.0, seed=2)).comparisons
    assert pair.claim is Claim.SAME
    assert (pair.base.num_runs, pair.new.num_runs) == (3, 3)
    tokens = RECIPE.tokens_per_step / 2.0 / 8
    assert pair.base.tokens_per_s_per_gpu == pytest.approx(tokens, rel=0.01)


@pytest.mark.parametrize(("new_s", "expected"), [(1.0, Claim.FASTER), (4.0, Claim.SLOWER)])
def test_another_speed_is_faster_or_slower(new_s: float, expected: Claim) -> None:
    (pair,) = compare(runs(2.0, seed=1), runs(new_s, seed=2)).comparisons
    assert pair.claim is expected
    assert pair.interval is not None
    assert pair.interval.estimate_ratio == pytest.approx(2.0 / new_s, rel=0.01)


def test_noisy_runs_decide_nothing_and_say_how_many_would() -> None:
    (pair,) = compare(runs(2.0, spread=0.1, seed=1), runs(2.0, spread=0.1, seed=2)).comparisons
    assert pair.claim is Claim.INCONCLUSIVE
    assert pair.num_runs_to_decide is not None
    assert pair.num_runs_to_decide > 3


def test_drifting_steps_decide_nothing_however_many_there_are() -> None:
    drift = tuple(1 + 0.05 * step for step in range(20))
    (pair,) = compare(runs(2.0), [record(full(), step_times_s=(drift,) * 8)]).comparisons
    assert (pair.claim, pair.num_runs_to_decide) == (Claim.INCONCLUSIVE, None)
    assert pair.new.has_settled is False


def test_unlike_runs_are_refused_with_what_differs() -> None:
    other = with_dispatcher("allgather")
    with pytest.raises(UnlikeRunsError, match=r"are unlike: dispatch.dispatcher: .* against allgather"):
        compare(runs(2.0), runs(2.0, plan=other))


def test_the_thing_under_test_may_differ() -> None:
    other = runs(1.0, plan=with_dispatcher("allgather"), dispatcher="AllGather", seed=2)
    (pair,) = compare(runs(2.0, seed=1), other, vary=["dispatcher"]).comparisons
    assert pair.claim is Claim.FASTER
    assert [one.fact for one in pair.under_test] == ["dispatch.dispatcher", "implementations.dispatcher"]


def test_a_second_difference_is_refused_beside_the_one_under_test() -> None:
    plan = with_dispatcher("allgather")
    plan = plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"seed": 9})})
    with pytest.raises(UnlikeRunsError, match="seed: 1234 against 9") as refused:
        compare(runs(2.0), runs(2.0, plan=plan), vary=["dispatcher"])
    assert "dispatch.dispatcher:" not in str(refused.value)


def test_two_sets_that_would_both_be_the_base_are_refused() -> None:
    base = [*runs(2.0, seed=1), *runs(2.0, seed=2, commit="fedcba")]
    with pytest.raises(BadInputError, match=r"BASE holds two sets of .* that differ in commit"):
        compare(base, runs(2.0, seed=3))


def test_one_folder_is_compared_by_what_varies_in_it() -> None:
    made = [
        *runs(2.0, seed=1, plan=with_dispatcher("alltoall")),
        *runs(1.0, seed=2, plan=with_dispatcher("allgather")),
        *runs(4.0, seed=3, plan=with_dispatcher("deepep")),
    ]
    found = compare_within(made, vary=["dispatcher"])
    assert [(pair.under_test[0].new, pair.claim) for pair in found.comparisons] == [
        ("allgather", Claim.FASTER),
        ("deepep", Claim.SLOWER),
    ]
    assert {pair.under_test[0].base for pair in found.comparisons} == {"alltoall"}
    assert found.only_base == ()
    with pytest.raises(BadInputError, match="with --vary FIELD"):
        compare_within(made, vary=[])


def test_empty_sides_are_named() -> None:
    with pytest.raises(BadInputError, match="NEW holds no records"):
        compare(runs(2.0), [])


def test_the_table_counts_the_claims_first_and_names_versions_that_differ() -> None:
    compared = compare(runs(2.0, seed=1), runs(2.0, seed=2, commit="fedcba"))
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        console.print(compared_view(compared))
    lines = capture.get().splitlines()
    assert lines[0].strip() == "1 same, 0 faster, 0 slower, 0 inconclusive"
    assert any("versions that differ: commit: 0123456789abcdef against fedcba" in line for line in lines)
    assert any(line.split()[-4:] == ["same", "3+3", "runs", "-"] for line in lines)


def test_json_has_the_interval_and_the_claim() -> None:
    data = compared_json(compare(runs(2.0, seed=1), runs(2.0, seed=2)))
    (pair,) = data["comparisons"]  # type: ignore[misc]
    assert pair["claim"] == "same"
    assert pair["ratio"]["low"] < 1 < pair["ratio"]["high"]


def test_the_verb_reads_folders_and_refuses_unlike_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for made in runs(2.0, seed=1):
        write_record(tmp_path / "old", made)
    for made in runs(2.0, seed=2):
        write_record(tmp_path / "new", made)
    assert main(["compare", str(tmp_path / "old"), str(tmp_path / "new"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["comparisons"][0]["claim"] == "same"
    write_record(tmp_path / "smoke", record())
    assert main(["compare", str(tmp_path / "old"), str(tmp_path / "smoke")]) == 2
    assert "are unlike: scale: full against smoke" in capsys.readouterr().err
