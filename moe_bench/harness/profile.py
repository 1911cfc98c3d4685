"""Steps under torch.profiler, Nsight Systems or a clock of its parts, every part of a layer named."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import distributed
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from moe_bench.harness.batches import Device
from moe_bench.harness.build import Training
from moe_bench.harness.layer.parts import parts_named
from moe_bench.harness.ranges import NvtxListener, bounded, heard_by, range_named
from moe_bench.harness.substitution import Substitution, substituted
from moe_bench.harness.timing import CudaMarks, DeviceMarks, HostClock
from moe_bench.results.kernel_summary import PartLine, kernel_lines, write_kernels, write_parts
from moe_bench.spec.profile import NSYS_SUFFIX, Profile

TRACE_SUFFIX = "trace.json.gz"
KERNELS_SUFFIX = "kernels.csv"
PARTS_SUFFIX = "parts.csv"


class RecordFunctionListener:
    """Ranges as torch.profiler shows them, on the thread that queues the work."""

    def start(self, name: str) -> record_function:
        """Start a range."""
        started = record_function(name)
        started.__enter__()
        return started

    def end(self, started: record_function) -> None:
        """End it; ranges may overlap, so that no `with` can hold them."""
        started.__exit__(None, None, None)


class SpanClock:
    """Marks the clock where every range starts and ends, and tells how long the ranges of a name were.

    A range holds those inside it: the MoE layer's is that of its router, experts and all. Nothing is waited
    for before `lines`.
    """

    def __init__(self, clock: DeviceMarks) -> None:
        self._clock = clock
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def start(self, name: str) -> tuple[str, Any]:
        """Mark the start."""
        return name, self._clock.mark()

    def end(self, started: tuple[str, Any]) -> None:
        """Mark the end."""
        name, mark = started
        self._spans[name].append((mark, self._clock.mark()))

    def lines(self) -> tuple[PartLine, ...]:
        """Each name with its calls and seconds, in order of first appearance."""
        return tuple(
            PartLine(
                name=name,
                num_calls=len(spans),
                total_s=sum(self._clock.between_s(start, end) for start, end in spans),
            )
            for name, spans in self._spans.items()
        )


def profiled(
    run_steps: Callable[[], object], built: Training, profile: Profile | None, *, device: Device
) -> tuple[str, ...]:
    """Run steps under the profiler and write what it saw; the names of the files of this rank.

    Without a `profile` the rank only runs them, beside others that are traced.
    Nsight Systems writes its own when the process ends; it must have been started with
    `--capture-range=cudaProfilerApi` (moe_bench/launch/nsys.py).
    """
    if profile is None:
        run_steps()
        return ()
    rank = distributed.get_rank()
    if profile.tool == "nsys":
        torch.cuda.profiler.start()
        with parts_of_step_named(built), heard_by(NvtxListener()):
            run_steps()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        return (Path(profile.file(rank, NSYS_SUFFIX)).name,) if profile.has_own_file else ()
    if profile.tool == "parts":
        spans = SpanClock(HostClock() if device == "cpu" else CudaMarks())
        with parts_of_step_named(built), heard_by(spans):
            run_steps()
        parts = Path(profile.file(rank, PARTS_SUFFIX))
        parts.parent.mkdir(parents=True, exist_ok=True)
        write_parts(parts, spans.lines())
        return (parts.name,)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with (
        parts_of_step_named(built),
        heard_by(RecordFunctionListener()),
        torch.profiler.profile(activities=activities) as seen,
    ):
        run_steps()
    trace, kernels = (Path(profile.file(rank, suffix)) for suffix in (TRACE_SUFFIX, KERNELS_SUFFIX))
    trace.parent.mkdir(parents=True, exist_ok=True)
    seen.export_chrome_trace(str(trace))
    write_kernels(kernels, kernel_lines(_calls(seen, device)))
    return trace.name, kernels.name


@contextlib.contextmanager
def parts_of_step_named(built: Training) -> Iterator[None]:
    """Make ranges of attention, the MoE layer and its parts, dense MLPs and the optimizer of all chunks."""
    with contextlib.ExitStack() as stack:
        for chunk in built.chunks:
            for module in chunk.modules():
                if isinstance(module, MoELayer):
                    stack.enter_context(parts_named(module))
                    stack.enter_context(_named(module, "forward", "MoE layer"))
                elif isinstance(module, Attention):
                    stack.enter_context(_named(module, "forward", "attention"))
                elif type(module) is MLP:
                    stack.enter_context(_named(module, "forward", "MLP"))
        step = built.optimizer.step

        def named_step() -> Any:
            with range_named("optimizer"):
                return step()

        stack.enter_context(substituted(Substitution(built.optimizer, "step", named_step)))
        yield


def _named(owner: Any, method: str, name: str) -> contextlib.AbstractContextManager[None]:
    inner = getattr(owner, method)

    def call(*inputs: Any, **options: Any) -> Any:
        return bounded(name, partial(inner, **options), *inputs)

    return substituted(Substitution(owner, method, call))


def _calls(seen: Any, device: Device) -> Iterator[tuple[str, int, float]]:
    """Name, calls and seconds of every kernel; without a GPU of every operator, its own time alone."""
    if device == "cpu":
        for line in seen.key_averages():
            if "::" in line.key and "autograd::" not in line.key:
                yield line.key, line.count, line.self_cpu_time_total * 1e-6
        return
    calls: dict[str, list[float]] = defaultdict(list)
    for event in seen.events():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            calls[event.name].append(event.self_device_time_total * 1e-6)
    yield from ((name, len(times_s), sum(times_s)) for name, times_s in calls.items())
