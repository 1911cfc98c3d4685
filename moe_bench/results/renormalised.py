"""Published rows on one scale: tokens/s/GPU, and TFLOPs/GPU counted as ours, whatever was printed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from moe_bench.analysis.flops import FlopsCounting, defines, gflops_per_token
from moe_bench.results.flops_convention import CONVENTIONS, OUR_COUNTING
from moe_bench.results.published import PublishedRow
from moe_bench.spec.model import ModelSpec

GIGA, TERA, PERCENT = 1e9, 1e12, 100


class Basis(StrEnum):
    """Where a row's tokens per second come from; the first two are the source's own figures."""

    PRINTED = "printed"
    STEP_TIME = "step time"
    TFLOPS = "TFLOPs"
    """Printed TFLOPs over the count that the source used."""
    MFU = "MFU"
    """Printed MFU times the peak that it is of, over the count that the source used (docs/registry.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Renormalised:
    """What one row says in our units; None where it cannot be said."""

    tokens_per_s_per_gpu: float | None
    basis: Basis | None
    flops_per_s_per_gpu: float | None
    """Counted as OUR_COUNTING says."""
    printed_flops_per_s_per_gpu: float | None
    """In the source's own convention, which `flops_convention` of the row names."""


def renormalised(row: PublishedRow, model: ModelSpec | None) -> Renormalised:
    """`row` on our scale; `model` is its architecture, None where `recipes/` has none.

    FLOPs/s per GPU = tokens/s per GPU x our FLOPs per token. Where a row prints TFLOPs alone, tokens/s = its
    TFLOPs over its own convention's FLOPs per token, so that ours = printed x (our count / its count). Where
    it prints an MFU alone, and the peak that this is of, its TFLOPs are their product.
    """
    tokens_per_s, basis = _tokens_per_s_per_gpu(row, model)
    ours = None if model is None else flops_per_token(row, model, OUR_COUNTING)
    printed = row.metrics.tflops_per_gpu
    return Renormalised(
        tokens_per_s_per_gpu=tokens_per_s,
        basis=basis,
        flops_per_s_per_gpu=None if tokens_per_s is None or ours is None else tokens_per_s * ours,
        printed_flops_per_s_per_gpu=None if printed is None else printed * TERA,
    )


def flops_per_token(row: PublishedRow, model: ModelSpec, counting: FlopsCounting) -> float | None:
    """Forward and backward of one token of what `row` trained, in `counting`.

    None where the row does not print its sequence length or trains no whole model, or where the convention
    does not say how to count this model. MTP counts where the row prints that it was trained.
    """
    if row.seq_len is None or not row.is_training:
        return None
    as_run = model if row.num_layers is None else model.model_copy(update={"num_layers": row.num_layers})
    if not defines(counting, as_run):
        return None
    return GIGA * gflops_per_token(
        as_run, seq_len=row.seq_len, num_mtp_layers=row.mtp or 0, counting=counting
    )


def source_flops_per_token(row: PublishedRow, model: ModelSpec) -> float | None:
    """The count that the row's source really used, mistakes included; None where its formula is not known."""
    if row.flops_convention is None:
        return None
    counting = CONVENTIONS[row.flops_convention].counting
    return None if counting is None else flops_per_token(row, model, counting)


def _tokens_per_s_per_gpu(row: PublishedRow, model: ModelSpec | None) -> tuple[float | None, Basis | None]:
    if row.printed_tokens_per_s_per_gpu is not None:
        return row.printed_tokens_per_s_per_gpu, Basis.PRINTED
    if row.tokens_per_s_per_gpu_from_step is not None:
        return row.tokens_per_s_per_gpu_from_step, Basis.STEP_TIME
    if row.estimate is not None:
        basis = Basis.TFLOPS if row.estimate.basis == "tflops" else Basis.MFU
        return row.estimate.tokens_per_s_per_gpu, basis
    theirs = None if model is None else source_flops_per_token(row, model)
    if theirs is None:
        return None, None
    metrics = row.metrics
    if metrics.tflops_per_gpu is not None:
        return metrics.tflops_per_gpu * TERA / theirs, Basis.TFLOPS
    if metrics.mfu_pct is not None and metrics.mfu_peak_tflops is not None:
        return metrics.mfu_pct / PERCENT * metrics.mfu_peak_tflops * TERA / theirs, Basis.MFU
    return None, None
