"""What a rank that ran alone says of its job: compute, the bound it sets, memory, and the run it projects."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from moe_bench.report.figures import GIB, TERA
from moe_bench.results.metrics import COUNTING
from moe_bench.results.record import Record
from moe_bench.results.slice_metrics import Bound, SliceMetrics, bound_of, slice_metrics

if TYPE_CHECKING:
    from moe_bench.projection.step import Projection

MAX_TRANSFERS_SHOWN = 3


def slice_rows(record: Record, *, dry_run_peak_bytes: int | None = None) -> list[tuple[str, str]]:
    """Rows of the table of a run; none where it is no slice.

    `dry_run_peak_bytes` is the peak of the same rank in a dry run.
    """
    if not record.plan.is_slice:
        return []
    carried = sorted(record.samples.stood_in_bytes.items(), key=lambda item: -item[1])
    shown = [f"{name} {num_bytes / GIB:.3g} GiB" for name, num_bytes in carried[:MAX_TRANSFERS_SHOWN]]
    shown += [f"{len(carried) - len(shown)} smaller"] if len(carried) > len(shown) else []
    rows = [
        ("read as", "compute of one rank, upper bound: no communication, no pipeline bubble"),
        ("not sent", f"{', '.join(shown) or 'nothing'} per step"),
    ]
    metrics = slice_metrics(record)
    return rows if metrics is None else [*rows, *_metric_rows(record, metrics, dry_run_peak_bytes)]


def slice_json(record: Record, *, dry_run_peak_bytes: int | None = None) -> dict[str, object] | None:
    """What a slice says of its job, as JSON; None where the record is of no slice."""
    metrics = slice_metrics(record)
    if metrics is None:
        return None
    bound, projection = _bound(record, metrics), _projected(record, metrics)
    return {
        **dataclasses.asdict(metrics),
        "rank": record.plan.rank,
        "pipeline_rank": record.plan.pipeline_rank,
        "dry_run_peak_bytes": dry_run_peak_bytes,
        "bound": None if bound is None else dataclasses.asdict(bound),
        "projected": None
        if projection is None
        else {
            "step_s": projection.step_s,
            "tokens_per_s_per_gpu": projection.tokens_per_s_per_gpu,
            "flops_per_s_per_gpu": projection.flops_per_s_per_gpu,
            "terms_s": {term.name: term.seconds for term in projection.terms},
        },
    }


def _metric_rows(
    record: Record, metrics: SliceMetrics, dry_run_peak_bytes: int | None
) -> list[tuple[str, str]]:
    unit = "process" if record.plan.recipe.system.gpu is None else "GPU"
    rows = [
        (
            "micro batch",
            f"{metrics.micro_batch_s * 1e3:.4g} ms, {metrics.num_micro_batches} per step; "
            f"left out: copies in the place of others, {metrics.stand_in_s * 1e3:.3g} ms per step",
        ),
        (
            f"compute TFLOPs/{unit}",
            f"{metrics.flops_per_s / TERA:.4g} model (counted: {COUNTING}), "
            f"{metrics.hardware_flops_per_s / TERA:.4g} hardware",
        ),
    ]
    bound, projection = _bound(record, metrics), _projected(record, metrics)
    if bound is not None:
        rows.append(("bounds the run at", _throughput(bound, unit)))
    if projection is not None:
        rows.append(("projected run", _throughput(_as_bound(projection), unit)))
    if record.plan.recipe.system.gpu is not None:
        rows.append(("peak memory beside", _memory_text(metrics, dry_run_peak_bytes)))
    return rows


def _bound(record: Record, metrics: SliceMetrics) -> Bound | None:
    whole = record.plan.whole
    return None if whole is None else bound_of(metrics, whole)


def _projected(record: Record, metrics: SliceMetrics) -> Projection | None:
    """The full run; None for a machine without rates."""
    plan = record.plan
    if plan.whole is None or plan.whole.system.gpu is None:
        return None
    from moe_bench.projection.slice_step import project_from_slice  # numpy, which most readers do not need

    return project_from_slice(plan, micro_batch_s=metrics.micro_batch_s, optimizer_s=metrics.optimizer_s)


def _as_bound(projection: Projection) -> Bound:
    return Bound(
        step_s=projection.step_s,
        tokens_per_s_per_gpu=projection.tokens_per_s_per_gpu,
        flops_per_s_per_gpu=projection.flops_per_s_per_gpu,
    )


def _throughput(one: Bound, unit: str) -> str:
    return (
        f"{one.flops_per_s_per_gpu / TERA:.4g} TFLOPs/{unit}, "
        f"{one.tokens_per_s_per_gpu:,.0f} tokens/s/{unit}, {one.step_s:.4g} s per step"
    )


def _memory_text(metrics: SliceMetrics, dry_run_peak_bytes: int | None) -> str:
    beside = {"closed form": metrics.closed_form_peak_bytes}
    if dry_run_peak_bytes is not None:
        beside["dry run"] = dry_run_peak_bytes
    return ", ".join(
        f"{name} {num_bytes / GIB:.2f} GiB (measured {metrics.peak_memory_bytes / num_bytes - 1:+.1%})"
        for name, num_bytes in beside.items()
    )
