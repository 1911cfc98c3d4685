"""Verdicts on samples of known answer: reproduced, faster, slower, undecided, and never where none is due."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from moe_bench.cli import main
from moe_bench.report.reproduce import Reproduction, Verdict, reproductions
from moe_bench.report.reproduce_view import MAX_LINES, newest_sets, reproduce_view, summary_line
from moe_bench.results.published import PublishedRow, load_rows
from moe_bench.results.record import Record
from moe_bench.results.renormalised import renormalised
from moe_bench.results.store import write_record
from moe_bench.spec.catalogue import data_root, find_recipe, recipe_paths, recipes_root
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Recipe
from moe_bench.spec.scale import full_plan
from tests.report.series import runs
from tests.results.records import record

LOADER = Loader(root=recipes_root())
ROWS = {row.id: row for row in load_rows(data_root() / "results" / "published")}


def recipe_without_differences() -> Recipe:
    """A recipe that copies its row in every column."""
    recipe = LOADER.recipe(find_recipe("deepseek_v3/h100_sxm_1024g_bf16", LOADER))
    assert recipe.differences == ()
    assert recipe.reproduces is not None
    return recipe


RECIPE = recipe_without_differences()
PLAN = full_plan(RECIPE, modified=())
ROW: PublishedRow = ROWS[str(RECIPE.reproduces)]


def step_s_of(recipe: Recipe) -> float:
    """The step time at which the 8 ranks of a made-up record have the published throughput per GPU."""
    row = ROWS.get(recipe.reproduces or "")
    tokens_per_s = None if row is None else renormalised(row, recipe.model).tokens_per_s_per_gpu
    return recipe.tokens_per_step / ((tokens_per_s or 1000) * 8)


def published_step_s() -> float:
    return step_s_of(RECIPE)


def reproduction(records: list[Record], recipe: Recipe = RECIPE) -> Reproduction:
    (found,) = reproductions([recipe], ROWS, records)
    return found


def test_runs_at_the_published_speed_are_reproduced() -> None:
    found = reproduction(list(runs(published_step_s(), plan=PLAN)))
    assert found.verdict is Verdict.REPRODUCED
    assert found.interval is not None
    assert found.interval.basis == "runs"
    assert 0.95 <= found.interval.low_ratio <= 1 <= found.interval.high_ratio <= 1.05
    assert found.tokens_per_s_per_gpu == pytest.approx(ROW.tokens_per_s_per_gpu, rel=0.01)


def test_three_percent_off_is_reproduced_and_ten_percent_is_not() -> None:
    assert reproduction(list(runs(published_step_s() / 0.97, plan=PLAN))).verdict is Verdict.REPRODUCED
    assert reproduction(list(runs(published_step_s() / 0.90, plan=PLAN))).verdict is Verdict.SLOWER
    assert reproduction(list(runs(published_step_s() / 1.10, plan=PLAN))).verdict is Verdict.FASTER


def test_a_noisy_sample_is_undecided_and_says_how_many_runs_would_decide() -> None:
    found = reproduction(list(runs(published_step_s(), spread=0.08, plan=PLAN)))
    assert found.verdict is Verdict.INCONCLUSIVE
    (because,) = found.because
    assert because.endswith(" runs")
    assert int(because.split()[0]) > 3


def test_one_run_is_judged_by_its_steps_and_only_promises_a_lower_bound() -> None:
    quiet = reproduction(list(runs(published_step_s(), num_runs=1, spread=0, plan=PLAN)))
    assert (quiet.verdict, quiet.num_runs) == (Verdict.REPRODUCED, 1)
    assert quiet.interval is not None
    assert quiet.interval.basis == "steps"
    noisy = reproduction(list(runs(published_step_s(), num_runs=1, spread=0, noise=0.3, plan=PLAN)))
    assert noisy.verdict is Verdict.INCONCLUSIVE
    assert noisy.because[0].startswith("≥")


def test_a_drift_gives_no_verdict() -> None:
    drift = tuple(published_step_s() * (1 + 0.05 * step) for step in range(20))
    found = reproduction([record(PLAN, step_times_s=(drift,) * 8)])
    assert (found.verdict, found.because) == (Verdict.INCONCLUSIVE, ("the steps drift",))


def test_a_run_that_differs_from_its_row_is_only_comparable() -> None:
    recipe = RECIPE.model_copy(update={"global_batch_size": 8192})
    plan = full_plan(recipe, modified=("global_batch_size=8192",))
    found = reproduction(list(runs(published_step_s() / 2, plan=plan)))
    assert found.verdict is Verdict.COMPARABLE
    assert found.because == ("global_batch_size=8192", "gbs: the row has 16384, the recipe 8192")
    assert found.interval is not None
    assert found.interval.estimate_ratio == pytest.approx(1, rel=0.01)


def test_a_recipe_that_carries_a_row_over_from_another_engine_is_only_comparable() -> None:
    recipe = LOADER.recipe(find_recipe("deepseek_v3/h100_sxm_256g_bf16", LOADER))
    found = reproduction(list(runs(10.0, plan=full_plan(recipe, modified=()))), recipe)
    assert found.verdict is Verdict.COMPARABLE
    assert any(one.startswith("framework:") for one in found.because)


@pytest.mark.parametrize("scale", ["smoke", "node", "slice"])
def test_smaller_scales_get_a_number_and_never_a_verdict(scale: str) -> None:
    plan = PLAN.model_copy(update={"scale": scale})
    found = reproduction(list(runs(published_step_s(), plan=plan)))
    assert (found.verdict, found.interval) == (Verdict.NONE, None)
    assert found.tokens_per_s_per_gpu is not None


def test_runs_of_two_commits_are_two_lines_and_the_newest_is_counted() -> None:
    old = runs(published_step_s() * 2, plan=PLAN, seed=1, commit="old")
    new = runs(published_step_s(), plan=PLAN, seed=2, commit="new")
    found = reproductions([RECIPE], ROWS, [*old, *new])
    assert [one.verdict for one in found] == [Verdict.REPRODUCED, Verdict.SLOWER]
    assert summary_line(found) == "1 published row: 1 reproduced"


def all_recipes() -> list[Recipe]:
    return [LOADER.recipe(path) for path in recipe_paths(LOADER.root)]


@pytest.mark.parametrize("has_results", [False, True])
def test_at_120_columns_the_table_has_at_most_40_lines(has_results: bool) -> None:
    made: list[Record] = []
    if has_results:
        for index, recipe in enumerate(all_recipes()):
            spread = (0.002, 0.04, 0.3)[index % 3]
            made += runs(step_s_of(recipe), spread=spread, plan=full_plan(recipe, modified=()))
    console = Console(width=120, no_color=True)
    with console.capture() as capture:
        console.print(reproduce_view(reproductions(all_recipes(), ROWS, made)))
    lines = capture.get().splitlines()
    num_rows = sum(recipe.reproduces is not None for recipe in all_recipes())
    assert len(lines) <= MAX_LINES == 40
    assert max(map(len, lines)) <= 120
    assert not any("…" in line for line in lines)
    if has_results:
        assert any(line.rstrip().endswith(" runs") for line in lines)
        assert f"{num_rows} published rows: " in lines[0]
        assert "inconclusive" in lines[0]
        assert "comparable with differences" in lines[0]
    else:
        assert lines[0].startswith(f"no full-scale result yet: {num_rows} published rows have a recipe")


def test_a_recipe_that_ran_often_does_not_hide_the_others() -> None:
    often = [
        one
        for number in range(50)
        for one in runs(published_step_s(), plan=PLAN, seed=number, commit=f"{number}")
    ]
    others = [recipe for recipe in all_recipes() if recipe.reproduces is not None and recipe != RECIPE][:5]
    once = [one for recipe in others for one in runs(1.0, plan=full_plan(recipe, modified=()))]
    shown = newest_sets(reproductions([RECIPE, *others], ROWS, [*often, *once]), num_lines=20)
    names = [one.published.recipe for one in shown]
    assert names == [RECIPE.name] * 15 + [recipe.name for recipe in others]


def test_the_verb_prints_rows_without_results_and_verdicts_with_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.joinpath("none").mkdir()
    asked = ["reproduce", "deepseek_v3", "--json"]
    assert main([*asked, "--results", str(tmp_path / "none")]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["counts"]["not run"] == len(data["rows"]) == 10
    for made in runs(published_step_s(), plan=PLAN):
        write_record(tmp_path / "made", made)
    assert main([*asked, "--results", str(tmp_path / "made")]) == 0
    first = json.loads(capsys.readouterr().out)["rows"][0]
    assert (first["recipe"], first["verdict"], first["num_runs"]) == (RECIPE.name, "reproduced", 3)


def test_a_recipe_without_a_row_has_nothing_to_reproduce(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "olmoe_1b_7b"]) == 2
    assert "copies no published row" in capsys.readouterr().err
