"""One case on one engine, measured on this machine from the weights to the record."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from moe_bench.errors import MeasurementError, MissingRequirementError
from moe_bench.harness import device_facts, sanity
from moe_bench.harness.calibrate.gemm import dense_call
from moe_bench.harness.calibrate.memory import memory_call
from moe_bench.harness.kernels.graphed_layer import require_capture
from moe_bench.harness.layer.inputs import LayerInputs, routed_inputs
from moe_bench.harness.layer.measure import (
    LayerCall,
    graphed_samples,
    held_samples,
    marked_samples,
    whole_samples,
)
from moe_bench.harness.layer.megatron import (
    MegatronEngine,
    engine_for,
    engine_named,
    expert_layer,
    megatron_engines,
)
from moe_bench.harness.layer.parts import parts_named
from moe_bench.harness.layer.weights import draw_weights
from moe_bench.harness.patches import patch_names, patches
from moe_bench.harness.timing import CudaClock, DeviceClock, HostClock, samples_s
from moe_bench.results.calibration import CalibrationProvenance, DenseGemm, MemoryBound
from moe_bench.results.calibration_tasks import DEVICE_TO_DEVICE, Implementation
from moe_bench.results.layer_record import HeldSamples, LayerRecord, PartSamples
from moe_bench.results.layer_samples import WholeSamples
from moe_bench.spec.layer_case import LayerCase
from moe_bench.spec.system import SystemSpec

GEMM_WIDTH, TINY_GEMM_WIDTH = 8192, 128
"""Of the square product that expert GEMMs are compared with: 1.1 TFLOP, which fills any GPU."""
COPY_BYTES, TINY_COPY_BYTES = 1024**3, 1024**2


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """The machine that layers are measured on, for as long as `bench_here` holds it."""

    device: str
    """`cuda` or `cpu`."""
    clock: DeviceClock
    system: SystemSpec
    is_tiny: bool

    def sm_clock_hz(self) -> float | None:
        """Of the GPU at this moment; None on a CPU, or where the driver does not say."""
        return device_facts.sm_clock_hz() if self.device == "cuda" else None

    def copy_bytes_per_s(self) -> float:
        """Bytes read and written per second by a copy on the device."""
        size = TINY_COPY_BYTES if self.is_tiny else COPY_BYTES
        copy = MemoryBound(
            operation="copy",
            variant=DEVICE_TO_DEVICE,
            shape=(size,),
            num_read_bytes=size,
            num_written_bytes=size,
        )
        call = memory_call(copy, "bf16", Implementation.COPY, self.device)
        return 2 * size / statistics.median(samples_s(call, self.clock))

    def dense_flops_per_s(self) -> float:
        """Of one large square matrix product in BF16."""
        width = TINY_GEMM_WIDTH if self.is_tiny else GEMM_WIDTH
        what = DenseGemm(operation="dense_gemm", num_rows=width, num_inner=width, num_columns=width)
        call = dense_call(what, "bf16", Implementation.MM, self.device)
        return what.num_flops / statistics.median(samples_s(call, self.clock))


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a measurement is for, and what it has beyond the whole and its parts."""

    differences: tuple[str, ...] = ()
    """What is otherwise than in a step of the recipe that the case is of."""
    suite: str | None = None
    held_for_s: float | None = None
    """How long to run the layer without a pause; None not to."""
    is_graphed: bool = False
    """Whether to time the layer captured as CUDA graphs as well."""
    peers: tuple[str, ...] | None = None
    """Engines to compare with, by name; empty for all, None for no comparison."""


@contextlib.contextmanager
def bench_here(system: SystemSpec, *, is_tiny: bool) -> Iterator[Bench]:
    """This machine as `system` describes it: its GPU, or for toys its CPU with Megatron-Core patched for it.

    Raises MissingRequirementError for real sizes without a GPU, MeasurementError on another GPU.
    """
    if system.gpu is not None:
        if not torch.cuda.is_available():
            raise MissingRequirementError(
                "layer needs a GPU and torch sees none; try the command on this machine with --tiny"
            )
        found = torch.cuda.get_device_name()
        sanity.require_gpu(rank=0, expected=system.gpu.device_name, found=found)
        yield Bench(device="cuda", clock=CudaClock(), system=system, is_tiny=is_tiny)
        return
    if not is_tiny:
        raise MissingRequirementError("layer: real sizes need a GPU; run toys on this machine with --tiny")
    from moe_bench.harness.host_device import host_device

    torch.set_num_threads(1)
    with host_device(), patches((*patch_names("host"), *patch_names("no_transformer_engine"))):
        yield Bench(device="cpu", clock=HostClock(), system=system, is_tiny=True)


def measure_layer(
    case: LayerCase,
    engine: MegatronEngine,
    bench: Bench,
    provenance: CalibrationProvenance,
    asked: Asked,
    *,
    on_progress: Callable[[str], None] = lambda text: None,
) -> LayerRecord:
    """Whole, parts, and what else is asked for, of `case` on `engine`.

    Raises MissingRequirementError where the engine does not run here, MeasurementError where the layer
    routes otherwise than the case says.
    """
    case = engine.case_for(case)
    start_hz = bench.sm_clock_hz()
    found = _built_and_timed(case, engine, bench, asked)
    beside = None
    if asked.peers is not None:
        # imports bench in turn, and other people's packages are looked for only where they are asked for
        from moe_bench.harness.layer.peers.registry import compare_peers

        beside = compare_peers(case, bench, names=asked.peers, on_progress=on_progress)
    return LayerRecord(
        is_tiny=bench.is_tiny,
        suite=asked.suite,
        provenance=provenance,
        case=case,
        engine=engine.name,
        implementation=found.implementation,
        differences=(*asked.differences, *_stood_in(case)),
        local_tokens_per_expert=found.received,
        whole=found.whole,
        marked=found.marked,
        parts=found.parts,
        unreachable=_unreachable(engine, found.parts),
        peak_memory_bytes=found.peak_bytes,
        copy_bytes_per_s=bench.copy_bytes_per_s(),
        dense_flops_per_s=bench.dense_flops_per_s(),
        start_sm_clock_hz=start_hz,
        end_sm_clock_hz=bench.sm_clock_hz(),
        held=found.held,
        graphed=found.graphed,
        peers=beside,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What one built layer gave, whose memory is free again."""

    implementation: str
    received: tuple[int, ...]
    """Rows of each of this rank's experts."""
    whole: WholeSamples
    marked: WholeSamples
    parts: tuple[PartSamples, ...]
    peak_bytes: int | None
    held: HeldSamples | None
    graphed: WholeSamples | None


def _built_and_timed(case: LayerCase, engine: MegatronEngine, bench: Bench, asked: Asked) -> _Found:
    weights = draw_weights(case, device=bench.device)
    inputs = routed_inputs(case, weights)
    before_bytes = torch.cuda.memory_allocated() if bench.device == "cuda" else 0
    with engine.build(case, weights, device=bench.device) as built:
        layer = expert_layer(built)
        if asked.is_graphed:
            require_capture(layer)
        call = LayerCall(built, inputs)
        _require_routing(case, layer, call)
        whole = whole_samples(call, bench.clock)
        peak_bytes = _peak_bytes(call, before_bytes) if bench.device == "cuda" else None
        marked, parts = marked_samples(call, bench.clock, parts_named(layer))
        held = None
        if asked.held_for_s is not None:
            held = held_samples(
                call,
                bench.clock,
                held_for_s=asked.held_for_s,
                sm_clock_hz=bench.sm_clock_hz,
                is_tiny=bench.is_tiny,
            )
        return _Found(
            implementation=built.implementation,
            received=_received(case, inputs),
            whole=whole,
            marked=marked,
            parts=parts,
            peak_bytes=peak_bytes,
            held=held,
            graphed=graphed_samples(call, layer, bench.clock) if asked.is_graphed else None,
        )


def engines_of(
    case: LayerCase, system: SystemSpec, names: Sequence[str], *, all_that_run: bool
) -> Iterator[tuple[MegatronEngine, str | None]]:
    """The engines to measure `case` on, each with what is in its way.

    Those named; or with `all_that_run` every family, of which the caller leaves out those with an obstacle;
    else the one of the case. What was asked for by name has no obstacle: it runs or raises.
    """
    if names:
        yield from ((engine_named(name, system), None) for name in names)
    elif all_that_run:
        yield from ((one, one.obstacle(case)) for one in megatron_engines(system) if one.is_grouped)
    else:
        yield engine_for(case, system), None


def _require_routing(case: LayerCase, layer: MoELayer, call: LayerCall) -> None:
    """Run once, and hold the router's own choice against the one that the inputs were made for."""
    counted: list[torch.Tensor] = []

    def count(module: object, inputs: object, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        counted.append(outputs[1].sum(dim=0))

    handle = layer.router.register_forward_hook(count)
    try:
        call()
    finally:
        handle.remove()
    found = tuple(int(number) for number in counted[0].tolist())
    if found != call.inputs.tokens_per_expert:
        raise MeasurementError(
            f"{case.name}: the layer sent {found} tokens to its experts, the case says "
            f"{call.inputs.tokens_per_expert}"
        )


def _received(case: LayerCase, inputs: LayerInputs) -> tuple[int, ...]:
    """Rows of this rank's experts: every rank sends what this one sends (loopback)."""
    return tuple(count * case.ep_size for count in inputs.tokens_per_expert[: case.num_local_experts])


def _peak_bytes(call: LayerCall, before_bytes: int) -> int:
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before_bytes


def _stood_in(case: LayerCase) -> tuple[str, ...]:
    if case.ep_size == 1:
        return ()
    return (f"dispatch and combine are copies on this device, in place of {case.ep_size} ranks' exchange",)


def _unreachable(engine: MegatronEngine, parts: tuple[PartSamples, ...]) -> dict[str, str]:
    found = {(part.part, part.in_pass) for part in parts}
    reasons = {}
    if ("fc1", "dgrad") not in found:
        reasons["fc1 and fc2: dgrad, wgrad"] = f"{engine.name} computes both in one backward pass"
    if not any(part == "activation" for part, _ in found):
        is_in_products = engine.family == "quack"
        where = (
            "the epilogues of fc1 forward and fc2 dgrad" if is_in_products else "experts, with what is beside"
        )
        reasons["activation"] = f"in {where}"
    return reasons
