"""The throughput that a projection of a published row is held against, and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_bench.results.flops_convention import CONVENTIONS
from moe_bench.results.published import PublishedRow
from moe_bench.results.renormalised import TERA, Basis, renormalised, source_flops_per_token
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.system import SystemSpec

TargetBasis = Literal["tokens", "tflops", "step", "mfu"]

_BASES: dict[Basis, TargetBasis] = {
    Basis.PRINTED: "tokens",
    Basis.STEP_TIME: "step",
    Basis.TFLOPS: "tflops",
    Basis.MFU: "mfu",
}
PERCENT = 100
_ROUNDED = "rounded"
"""How a row's note says that its tokens per second are rounded."""
_AGREEMENT_FRACTION = 0.03
"""Largest distance at which TFLOPs may stand in for rounded tokens per second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What was measured, in tokens per second and GPU."""

    tokens_per_s_per_gpu: float
    basis: TargetBasis


def target_of(row: PublishedRow, model: ModelSpec, system: SystemSpec) -> Target | None:
    """The throughput of `row`; None where it states none.

    Printed tokens/s; TFLOPs over the source's own count where the tokens are rounded, or where it prints
    nothing else; tokens of a step over its time; an estimate of the registry (docs/registry.md); an MFU in
    BF16. Where tokens/s and step time contradict each other, the one that agrees with the TFLOPs counts.
    """
    ours = renormalised(row, model)
    if ours.tokens_per_s_per_gpu is None or ours.basis is None:
        return _from_mfu(row, model, system)
    exact = _from_tflops(row, model)
    target = Target(tokens_per_s_per_gpu=ours.tokens_per_s_per_gpu, basis=_BASES[ours.basis])
    if exact is None:
        return target
    if _ROUNDED in (row.note or "") and _agree(exact, target.tokens_per_s_per_gpu):
        return Target(tokens_per_s_per_gpu=exact, basis="tflops")
    from_step = row.tokens_per_s_per_gpu_from_step
    contradicts = row.inconsistency_fraction is not None and row.inconsistency_fraction > _AGREEMENT_FRACTION
    if contradicts and from_step is not None and _agree(exact, from_step):
        return Target(tokens_per_s_per_gpu=from_step, basis="step")
    return target


def _from_tflops(row: PublishedRow, model: ModelSpec) -> float | None:
    """Printed TFLOPs over the source's count; None where it is not known or was mistaken."""
    if row.metrics.tflops_per_gpu is None or row.flops_convention is None:
        return None
    if CONVENTIONS[row.flops_convention].meant is not None:
        return None
    count = source_flops_per_token(row, model)
    return None if count is None else row.metrics.tflops_per_gpu * TERA / count


def _from_mfu(row: PublishedRow, model: ModelSpec, system: SystemSpec) -> Target | None:
    """MFU x peak / the source's count; the peak is the printed one or the datasheet's, and BF16's alone."""
    count = source_flops_per_token(row, model)
    if row.metrics.mfu_pct is None or count is None or row.precision != "BF16" or system.gpu is None:
        return None
    printed = row.metrics.mfu_peak_tflops
    peak_flops_per_s = system.gpu.bf16_flops_per_s if printed is None else printed * TERA
    tokens_per_s = row.metrics.mfu_pct / PERCENT * peak_flops_per_s / count
    return Target(tokens_per_s_per_gpu=tokens_per_s, basis="mfu")


def _agree(one: float, other: float) -> bool:
    return abs(one / other - 1) <= _AGREEMENT_FRACTION
