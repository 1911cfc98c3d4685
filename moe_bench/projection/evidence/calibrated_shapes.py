"""Measurements of results/calibration as evidence of the projection: its own operations with their times."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from moe_bench.errors import BadInputError
from moe_bench.projection.evidence.nearest_shapes import Miss, NearestShapes
from moe_bench.projection.evidence.rates import attended_tokens
from moe_bench.projection.work.operations import AttentionCore, Gemm, MemoryBound, Number, Part, Pass
from moe_bench.results import calibration as measured
from moe_bench.results.store import CALIBRATION_FOLDER
from moe_bench.spec.system import GpuSpec

Kernel = Gemm | AttentionCore | MemoryBound
"""Operations that measurements may know."""

Kind = tuple[str, ...]
"""Operations whose measurements may be interpolated between."""

_NUMBERS: Mapping[measured.Dtype, Number] = MappingProxyType(
    {"bf16": Number.BF16, "fp8_e4m3": Number.FP8_TENSORWISE, "fp8_e5m2": Number.FP8_TENSORWISE}
)
_GROUPED_PASSES: Mapping[measured.Direction, Pass] = MappingProxyType(
    {"forward": Pass.FORWARD, "dgrad": Pass.DGRAD, "wgrad": Pass.WGRAD}
)
_PARTS: Mapping[str, Part] = MappingProxyType(
    {"permutation": Part.PERMUTATION, "norm": Part.NORMS, "router": Part.ROUTER}
)
_MAX_SKEW = 1.1
"""Largest group over the mean up to which a grouped product counts as balanced."""


def kind_of(operation: Kernel) -> Kind:
    """Dense products share a kind whatever their pass: on a B200 Transformer Engine's three differ by 2 %."""
    if isinstance(operation, Gemm):
        if operation.num_groups == 1:
            return ("dense product", operation.number)
        in_pass = Pass.FORWARD if operation.in_pass is Pass.RECOMPUTE else operation.in_pass
        target = "added to FP32" if operation.accumulates else "written"
        return ("grouped product", operation.number, in_pass, target)
    if isinstance(operation, AttentionCore):
        is_forward = operation.in_pass in (Pass.FORWARD, Pass.RECOMPUTE)
        return ("attention", "forward" if is_forward else "backward")
    return ("memory", operation.part)


def sizes_of(operation: Kernel) -> tuple[float, ...]:
    """What the measurements of one kind are interpolated in."""
    if isinstance(operation, Gemm):
        sizes = (operation.num_rows, operation.num_inner, operation.num_columns)
        return sizes if operation.num_groups == 1 else (*sizes, float(operation.num_groups))
    if isinstance(operation, AttentionCore):
        head_dim = (operation.qk_head_dim + operation.v_head_dim) / 2
        # the square root of the work: at one length it grows with heads and sequences, which fill the GPU
        tokens = attended_tokens(seq_len=operation.seq_len, context=operation.context)
        return (tokens, head_dim, operation.num_flops**0.5)
    return (operation.num_bytes,)


class CalibratedShapes:
    """Every operation that calibration files of one GPU hold, by kind."""

    def __init__(
        self, gpu: GpuSpec, calibrations: Sequence[measured.Calibration], law_s: Callable[[Kernel], float]
    ) -> None:
        """`law_s` gives the law's time of a single call. BadInputError for files of another GPU."""
        for calibration in calibrations:
            name = calibration.provenance.gpu.name
            if name != gpu.device_name:
                raise BadInputError(
                    f"calibration of {calibration.provenance.started_at}: measured on {name}, the system "
                    f"has {gpu.device_name}; leave it out"
                )
        times_s = _fastest(one for calibration in calibrations for one in calibration.measurements)
        self._shapes = {
            kind: NearestShapes(
                [sizes_of(operation) for operation in operations],
                [time_s / law_s(operation) for operation, time_s in operations.items()],
            )
            for kind, operations in times_s.items()
        }

    def lookup(self, operation: Kernel) -> float | Miss:
        """Measured time over the law's at this operation."""
        kind = kind_of(operation)
        shapes = self._shapes.get(kind)
        if shapes is None:
            return Miss(f"no calibration has measured: {', '.join(kind)}")
        return shapes.lookup(sizes_of(operation))


def read_calibrations(gpu: GpuSpec, results: Path) -> tuple[measured.Calibration, ...]:
    """The calibration files of `gpu` under `results`, oldest first, those of toy shapes left out.

    Raises BadInputError for one that is broken.
    """
    paths = sorted((results / CALIBRATION_FOLDER).glob("*/*.json"), key=lambda path: path.name)
    calibrations = [measured.read_calibration(path) for path in paths]
    return tuple(
        one for one in calibrations if one.is_evidence and one.provenance.gpu.name == gpu.device_name
    )


def _fastest(measurements: Iterable[measured.Measurement]) -> dict[Kind, dict[Kernel, float]]:
    """Operations of the projection with the least median over implementations; with a cold L2 where a kind
    was measured so at all, as in a training step.
    """
    by_kind: dict[Kind, list[tuple[Kernel, measured.Measurement]]] = defaultdict(list)
    for one in measurements:
        for operation in operations_of(one):
            by_kind[kind_of(operation)].append((operation, one))
    times_s: dict[Kind, dict[Kernel, float]] = {}
    for kind, pairs in by_kind.items():
        is_cold = any(one.cold_l2 for _, one in pairs)
        times_s[kind] = {}
        for operation, one in pairs:
            if one.cold_l2 == is_cold:
                before_s = times_s[kind].get(operation, one.median_s)
                times_s[kind][operation] = min(before_s, one.median_s)
    return times_s


def operations_of(one: measured.Task) -> Iterator[Kernel]:
    """A measured call in the projection's terms; nothing for what the projection has no operation for."""
    what, number = one.what, _NUMBERS.get(one.dtype)
    if isinstance(what, measured.DenseGemm) and number is not None:
        yield Gemm(
            part=Part.DENSE_MLP,
            in_pass=Pass.FORWARD,
            num_rows=what.num_rows,
            num_inner=what.num_inner,
            num_columns=what.num_columns,
            number=number,
        )
    elif isinstance(what, measured.GroupedGemm) and number is not None:
        yield from _grouped(what, number)
    elif isinstance(what, measured.AttentionCore) and one.dtype == "bf16":
        yield AttentionCore(
            in_pass=Pass.FORWARD if what.direction == "forward" else Pass.DGRAD,
            num_flops=what.num_flops,
            seq_len=min(what.window_tokens or what.seq_len, what.seq_len),
            context=1,
            qk_head_dim=what.qk_head_dim,
            v_head_dim=what.v_head_dim,
        )
    elif isinstance(what, measured.MemoryBound) and what.operation in _PARTS:
        yield MemoryBound(
            part=_PARTS[what.operation],
            in_pass=Pass.FORWARD if what.direction == "forward" else Pass.DGRAD,
            num_bytes=what.num_bytes(one.dtype),
        )


def _grouped(what: measured.GroupedGemm, number: Number) -> Iterator[Gemm]:
    """Balanced products only: what skew costs is not a property of the shape."""
    groups = what.tokens_per_expert
    rows = sum(groups) / len(groups)
    if max(groups) > _MAX_SKEW * rows:
        return
    sizes = {
        "forward": (rows, what.num_inputs, what.num_outputs),
        "dgrad": (rows, what.num_outputs, what.num_inputs),
        "wgrad": (what.num_outputs, rows, what.num_inputs),
    }[what.direction]
    yield Gemm(
        part=Part.EXPERTS,
        in_pass=_GROUPED_PASSES[what.direction],
        num_rows=sizes[0],
        num_inner=sizes[1],
        num_columns=sizes[2],
        num_groups=len(groups),
        number=number,
        accumulates=what.accumulates_fp32,
    )
