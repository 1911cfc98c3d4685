"""Errors counted by hand, rows counted and named, and a baseline that has not seen what it predicts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from moe_bench.projection.accuracy.fit import projected_tokens_per_s
from moe_bench.projection.accuracy.step_time import (
    Projectable,
    RowResult,
    cross_validated,
    observations,
    prints_layout,
    projectable,
    summaries_by,
    summary,
)
from moe_bench.projection.constants import Constants
from moe_bench.projection.rows.engines import TRAITS, is_fitted, traits_of
from moe_bench.projection.rows.inference import InferredRun
from moe_bench.projection.rows.stack import Engine
from moe_bench.projection.step import project
from tests.projection.published_rows import CATALOGUE, ROWS, inferred, made_row
from tests.projection.registry import accuracy, found


def result(error: float, *, baseline: float = 0.5) -> RowResult:
    """A made row whose projection is slow by `error`."""
    run = inferred()
    return RowResult(
        run=run,
        projected_tokens_per_s_per_gpu=run.tokens_per_s_per_gpu / (1 + error),
        baseline_tokens_per_s_per_gpu=run.tokens_per_s_per_gpu / (1 + baseline),
    )


def test_errors_are_those_of_step_time_by_hand() -> None:
    found = summary([result(error) for error in (-0.1, 0.2, 0.3, -0.4)])
    assert found.num_rows == 4
    assert found.mape_fraction == pytest.approx(0.25)
    assert found.median_fraction == pytest.approx(0.25)
    assert found.bias_fraction == pytest.approx(0)
    assert found.p90_fraction == pytest.approx(0.37)
    assert found.baseline_mape_fraction == pytest.approx(0.5)


def test_a_projection_that_promises_too_little_has_a_positive_error() -> None:
    slow = result(0.25)
    assert slow.projected_tokens_per_s_per_gpu == pytest.approx(0.8 * slow.run.tokens_per_s_per_gpu)
    assert slow.step_time_error == pytest.approx(0.25)


def test_an_anchor_corrects_by_what_it_is_off() -> None:
    assert result(0.2).corrected_by(result(0.2)).step_time_error == pytest.approx(0)
    assert result(0.2).corrected_by(result(-0.2)).step_time_error == pytest.approx(0.5)


def test_a_row_contradicted_by_more_than_two_fifths_is_a_suspect() -> None:
    assert result(0.41).is_suspect
    assert result(-0.41).is_suspect
    assert not result(0.39).is_suspect


def test_rows_that_cannot_be_projected_are_kept_with_the_reason() -> None:
    rows = [
        made_row(),
        made_row(id="unknown", model="Nothing-1B"),
        made_row(id="lora", kind="lora"),
    ]
    made = projectable(rows, CATALOGUE)
    assert [run.row.id for run in made.runs] == ["made"]
    reasons = {one.row.id: one.reason for one in made.failed}
    assert reasons["unknown"] == "no architecture facts of Nothing-1B"
    assert made.num_others == 1


def test_every_training_row_is_projected_or_named() -> None:
    made = found()
    ids = Counter(run.row.id for run in made.runs) + Counter(one.row.id for one in made.failed)
    assert ids == Counter(row.id for row in ROWS)
    assert all(one.reason for one in made.failed)


def test_a_layout_is_full_with_grid_sizes_and_batch() -> None:
    assert prints_layout(made_row())
    for column in ("tp", "num_gpus", "seq_len", "gbs", "precision", "hardware"):
        assert not prints_layout(made_row(**{column: None})), column
    assert prints_layout(made_row(tp=None, pp=None, sharding="fsdp2", num_shards=16))


def only(keep: Callable[[InferredRun], bool]) -> Projectable:
    """The registry without the runs that are not wanted, which would take their time."""
    made = found()
    pairs = [(run, work) for run, work in zip(made.runs, made.works, strict=True) if keep(run)]
    runs, works = zip(*pairs, strict=True)
    return replace(made, runs=runs, works=works)


def test_the_projection_of_a_row_is_what_project_says_of_its_recipe() -> None:
    made = only(lambda run: run.row.id in SAMPLE)
    constants = Constants()
    projected = projected_tokens_per_s(observations(made, start=constants), constants)
    alone = [project(run.recipe, constants=constants, traits=traits_of(run)) for run in made.runs]
    assert projected == pytest.approx([one.tokens_per_s_per_gpu for one in alone], rel=1e-9)
    assert len(made.runs) == len(SAMPLE)


SAMPLE = (
    "automodel-deepseek-v3-h100-256gpu-bf16-s4096",
    "torchtitan-deepseek-v3-h100-512gpu-bf16-s4096-deepep",
    "dgxc-v25.05.05-deepseek-v3-h100-512gpu-bf16-s4096",
)


def test_repeats_of_a_configuration_weigh_as_much_as_one_row() -> None:
    rows = [
        made_row(),
        made_row(id="again", version="NeMo 26.06 (v0.5.0, 2026-06)"),
        made_row(id="c", trust="C"),
    ]
    weights = observations(projectable(rows, CATALOGUE), start=Constants()).weight
    assert weights == pytest.approx([math.sqrt(0.5), math.sqrt(0.5), 0])


def test_other_engines_are_scored_and_not_fitted_and_have_traits_of_their_own() -> None:
    counted = accuracy("model").counted
    engines = {one.run.stack.engine for one in counted}
    assert {Engine.MEGATRON, Engine.AUTOMODEL, Engine.TORCHTITAN} <= engines
    assert {one.run.stack.engine for one in counted if is_fitted(one.run)} == {Engine.MEGATRON}
    assert set(TRAITS) == set(Engine)
    assert TRAITS[Engine.AUTOMODEL].stops_recompute_early


def test_functional_runs_and_approximate_rows_are_listed_and_do_not_count() -> None:
    made = accuracy("model")
    aside = [one for one in made.results if not one.counts]
    assert {one.run.row.kind == "pretrain_functional" or one.run.row.trust == "C" for one in aside} == {True}
    assert len(made.counted) + len(aside) == len(found().runs)


def test_groups_are_ordered_by_size_and_add_up() -> None:
    counted = accuracy("model").counted
    groups = summaries_by(counted, lambda one: one.run.fold("system"))
    sizes = [one.num_rows for one in groups.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) == len(counted)


def test_the_naive_predictor_has_not_seen_the_fold_it_predicts() -> None:
    """Doubling what a family published changes the projection of no baseline of that family."""
    family = "qwen3_30b_a3b"
    made = only(lambda run: run.fold("model") in (family, "gpt_oss_120b", "mixtral_8x22b"))
    doubled = replace(
        made,
        runs=tuple(
            replace(run, target=replace(run.target, tokens_per_s_per_gpu=2 * run.tokens_per_s_per_gpu))
            if run.fold("model") == family
            else run
            for run in made.runs
        ),
    )

    def baselines(one: Projectable) -> dict[str, float]:
        observed, start = observations(one, start=Constants()), Constants()
        results, _ = cross_validated(
            one.runs, observed, fold=lambda run: run.fold("model"), start=start, names=("launch_s",)
        )
        return {
            each.run.row.id: each.baseline_tokens_per_s_per_gpu
            for each in results
            if each.run.fold("model") == family
        }

    assert baselines(doubled) == pytest.approx(baselines(made))
