"""Constants of the projection out of a calibration: measured on a GPU, in the place of the fitted ones."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from moe_bench.errors import BadInputError
from moe_bench.projection.constants import Constants
from moe_bench.projection.evidence.grade import Grade
from moe_bench.projection.evidence.rates import KERNEL_START_S, MEMORY_HBM_FRACTION
from moe_bench.results.calibration import (
    AttentionCore,
    Calibration,
    DenseGemm,
    Launch,
    Measurement,
    MemoryBound,
    MoeLayer,
    Operation,
    Sustained,
)
from moe_bench.spec.system import GpuSpec, SystemSpec

Measurements = Sequence[Measurement]

_OF_A_LAYER = ("permutation", "norm", "router")


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedConstants:
    """Constants, and which of them were measured here."""

    constants: Constants
    sources: Mapping[str, str]
    """By the name of a measured constant, what it comes from."""

    def grade(self, name: str) -> Grade:
        """Evidence behind the constant of this name."""
        return Grade.MEASURED_HERE if name in self.sources else Grade.FITTED


def constants_for(
    system: SystemSpec,
    calibrations: Sequence[Calibration],
    base: Constants | None = None,
    *,
    with_shapes: bool = True,
) -> CalibratedConstants:
    """`base` with what `calibrations` measured of the GPU of `system`.

    Files of other GPUs and of toy shapes are passed over; a system without a GPU gets `base`. `with_shapes`
    as in `calibrated_constants`.
    """
    gpu = system.gpu
    own = [one for one in calibrations if gpu is not None and one.provenance.gpu.name == gpu.device_name]
    base = base or Constants()
    if gpu is None or not any(one.is_evidence for one in own):
        return CalibratedConstants(constants=base, sources={})
    evidence = [one for one in own if one.is_evidence]
    return calibrated_constants(evidence, gpu, base, with_shapes=with_shapes)


def calibrated_constants(
    calibrations: Sequence[Calibration], gpu: GpuSpec, base: Constants, *, with_shapes: bool
) -> CalibratedConstants:
    """`base` with every constant that the files of one GPU determine.

    `with_shapes` says that `Efficiency` prices operations by the same files. Its prices of memory-bound ones
    are relative to MEMORY_HBM_FRACTION, so that share then makes them what was measured; without it the share
    is that of all such kernels measured.
    Raises BadInputError for files that are no evidence about `gpu`: of another one, a CPU, or toy shapes.
    """
    for one in calibrations:
        if not one.is_evidence or one.provenance.gpu.name != gpu.device_name:
            raise BadInputError(
                f"calibration of {one.provenance.started_at}: {one.provenance.gpu.name}"
                f"{', toy shapes' if one.is_tiny else ''} says nothing about {gpu.device_name}; leave it out"
            )
    found = [measurement for one in calibrations for measurement in one.measurements]
    values: dict[str, float] = {}
    sources: dict[str, str] = {}

    def put(name: str, measured: tuple[float, str] | None) -> None:
        if measured is not None:
            values[name], sources[name] = measured

    put("sustained_fraction", _held(found, MoeLayer) or _held(found, DenseGemm))
    put("sustained_attention_fraction", _held(found, AttentionCore))
    put("launch_s", _launch(found))
    put("stream_fraction", _bandwidth(found, ("optimizer_step",), gpu))
    share = _bandwidth(found, _OF_A_LAYER, gpu)
    if share is not None and with_shapes:
        share = (MEMORY_HBM_FRACTION, "memory-bound kernels priced as measured, by shape")
    put("memory_fraction", share)
    return CalibratedConstants(constants=replace(base, **values), sources=sources)


def sustained_ratio(measurements: Measurements, held: Measurement) -> float | None:
    """Seconds of a call in a burst over those of the same call held as in `held`; None without a burst.

    Of what is held, the second half counts: the first one is the way to a steady temperature.
    """
    if not isinstance(held.what, Sustained) or held.what.held_s == 0:
        return None
    bursts = [
        one.median_s
        for one in measurements
        if isinstance(one.what, Sustained)
        and one.what.held_s == 0
        and (one.what.work, one.dtype, one.implementation)
        == (held.what.work, held.dtype, held.implementation)
    ]
    steady = held.samples_s[len(held.samples_s) // 2 :]
    return statistics.median(bursts) / statistics.median(steady) if bursts else None


def _held(measurements: Measurements, kind: type) -> tuple[float, str] | None:
    """Median ratio over all work of this kind that was held and seen in bursts."""
    ratios = []
    for one in measurements:
        if isinstance(one.what, Sustained) and isinstance(one.what.work, kind):
            ratio = sustained_ratio(measurements, one)
            if ratio is not None:
                ratios.append((ratio, one.what))
    if not ratios:
        return None
    what = ratios[0][1]
    named = what.work.operation.replace("_", " ")
    return statistics.median(ratio for ratio, _ in ratios), f"{named} held for {what.held_s:g} s over bursts"


def _launch(measurements: Measurements) -> tuple[float, str] | None:
    """Host seconds per kernel of Megatron-Core's layers; bare launches lack the modules and autograd."""
    times_s = [
        one.median_s / one.what.num_kernels
        for one in measurements
        if isinstance(one.what, Launch) and one.what.layers_of is not None
    ]
    if not times_s:
        return None
    return statistics.median(times_s), "host time of Megatron-Core's layers over few tokens, per kernel"


def _bandwidth(
    measurements: Measurements, operations: tuple[str, ...], gpu: GpuSpec
) -> tuple[float, str] | None:
    """Bytes over the time left after a kernel's start, as a share of the datasheet's bandwidth."""
    times_s = _fastest(measurements, lambda what: what.operation in operations)
    pairs = [(num_bytes, time_s - KERNEL_START_S) for num_bytes, time_s in times_s]
    total_bytes = sum(num_bytes for num_bytes, time_s in pairs if time_s > 0)
    total_s = sum(time_s for _, time_s in pairs if time_s > 0)
    if not total_s:
        return None
    return total_bytes / total_s / gpu.hbm_bytes_per_s, f"{', '.join(operations)}: {len(pairs)} shapes"


def _fastest(measurements: Measurements, wanted: Callable[[Operation], bool]) -> Iterator[tuple[int, float]]:
    """Bytes and least median over implementations of every memory-bound operation wanted."""
    best: dict[MemoryBound, float] = {}
    for one in measurements:
        if isinstance(one.what, MemoryBound) and wanted(one.what):
            best[one.what] = min(best.get(one.what, one.median_s), one.median_s)
    for what, time_s in best.items():
        yield what.num_read_bytes + what.num_written_bytes, time_s
