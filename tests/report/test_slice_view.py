"""What a slice says of its job, from samples whose reduction is known by hand."""

from __future__ import annotations

import pytest

from moe_bench.projection.slice_step import modelled_rank
from moe_bench.report.slice_view import slice_json, slice_rows
from moe_bench.results.metrics import COUNTING
from moe_bench.results.record import AloneSamples, Record
from moe_bench.results.slice_metrics import bound_of, slice_metrics
from tests.results.records import one_rank, record


def alone(schedule_s: float = 1.9) -> Record:
    """A step of 0.1 s more than its schedule, of which 0.1 s are copies."""
    run = record(one_rank(), step_times_s=((schedule_s + 0.1,) * 3,))
    samples = AloneSamples(schedule_times_s=(schedule_s,) * 3, stand_in_s=0.1)
    return run.model_copy(update={"samples": run.samples.model_copy(update={"alone": samples})})


def test_a_micro_batch_is_the_schedule_less_copies_over_their_number() -> None:
    metrics = slice_metrics(alone())
    assert metrics is not None
    # one rank of qwen3_30b_a3b on 8 GPUs runs two micro batches
    assert metrics.num_micro_batches == 2
    assert metrics.micro_batch_s == pytest.approx(0.9)
    assert metrics.optimizer_s == pytest.approx(0.1)
    assert metrics.hardware_flops_per_s > metrics.flops_per_s


def test_the_bound_is_all_micro_batches_and_one_optimizer_step() -> None:
    run = alone()
    metrics, whole = slice_metrics(run), run.plan.whole
    assert metrics is not None
    assert whole is not None
    bound = bound_of(metrics, whole)
    assert bound.step_s == pytest.approx(0.9 * whole.num_micro_batches + 0.1)
    tokens = whole.global_batch_size * whole.seq_len
    assert bound.tokens_per_s_per_gpu == pytest.approx(tokens / 8 / bound.step_s)
    # without a pipeline the rank's share of the model is the whole model's
    compute_share = whole.num_micro_batches * 0.9 / bound.step_s
    assert bound.flops_per_s_per_gpu == pytest.approx(metrics.flops_per_s * compute_share)


def test_the_projected_run_adds_what_is_sent() -> None:
    plan = one_rank()
    rank = modelled_rank(plan.recipe, plan.pipeline_rank)
    shown = slice_json(alone(2 * rank.micro_batch_s + 0.1))
    assert shown is not None
    projected = shown["projected"]
    assert isinstance(projected, dict)
    assert projected["terms_s"]["exposed dispatch and combine"] > 0
    assert projected["terms_s"]["optimizer"] == pytest.approx(0.1)
    assert sum(projected["terms_s"].values()) == pytest.approx(projected["step_s"])


def test_the_rows_show_what_was_asked_for_and_how_it_was_counted() -> None:
    rows = dict(slice_rows(alone(), dry_run_peak_bytes=2**30))
    assert str(COUNTING) in rows["compute TFLOPs/GPU"]
    assert "dry run 1.00 GiB (measured +0.0%)" in rows["peak memory beside"]
    assert "dry run" not in dict(slice_rows(alone()))["peak memory beside"]


def test_other_runs_have_none_of_it() -> None:
    assert slice_rows(record()) == []
    assert slice_json(record()) is None
