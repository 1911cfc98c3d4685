"""A list of tasks measured one after the other on this machine, each written down before the next."""

from __future__ import annotations

import contextlib
import importlib.util
import platform
import socket
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from moe_bench.errors import MeasurementError, MissingRequirementError, MoeBenchError
from moe_bench.harness import device_facts
from moe_bench.harness.calibrate.attention import attention_call
from moe_bench.harness.calibrate.gemm import dense_call, grouped_call
from moe_bench.harness.calibrate.inputs import FreshBackward
from moe_bench.harness.calibrate.launch import bare_samples_s, layers_samples_s
from moe_bench.harness.calibrate.memory import memory_call
from moe_bench.harness.calibrate.moe_layer import moe_layer_call
from moe_bench.harness.timing import (
    Call,
    CudaClock,
    DeviceClock,
    HostClock,
    burst_samples_s,
    held_samples_s,
    samples_s,
)
from moe_bench.results.calibration import (
    CPU,
    AttentionCore,
    CalibrationProvenance,
    DenseGemm,
    Dtype,
    GroupedGemm,
    Launch,
    Measurement,
    MemoryBound,
    MoeLayer,
    Operation,
    Sustained,
    Task,
    Unmeasured,
)
from moe_bench.results.calibration_journal import Entry, Journal
from moe_bench.results.calibration_tasks import COMPILED, PAUSE_S, WINDOW_S, Implementation
from moe_bench.results.provenance import git_state, installed_packages, job_id_here, recorded_environment
from moe_bench.results.record import GpuFacts
from moe_bench.spec.recipe import Recipe

SEED = 1234
_REFUSALS = (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, ImportError)
"""How torch, Megatron-Core and Transformer Engine say that they have no kernel, no memory, or another
interface in this release. One of a thousand kernels must not end the others; file and table name it."""
_TINY_PAUSE_S = 0.01
_TINY_WINDOW_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """How tasks are measured here."""

    device: str
    """`cuda` or `cpu`."""
    clock: DeviceClock
    launching_toy: Callable[[int], Recipe]
    """The recipe whose layers are launched, with so many of them."""
    is_tiny: bool

    def measure(self, task: Task) -> Entry:
        """Its samples, or why there are none: a package or a kernel is missing, or the memory too small."""
        before_hz = self.sm_clock_hz()
        try:
            # torch warns of slow paths; which one ran stands in the file
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = self._samples_s(task)
        except MoeBenchError as error:
            return _unmeasured(task, str(error))
        except _REFUSALS as error:
            first_line = next(iter(str(error).strip().splitlines()), "no words")
            return _unmeasured(task, f"{type(error).__name__}: {first_line}")
        finally:
            if self.device == "cuda":
                # of a GPU in error too; `require_working` tells that
                with contextlib.suppress(RuntimeError):
                    torch.cuda.empty_cache()
        is_flushed = not isinstance(task.what, Launch | Sustained)
        return Measurement(
            what=task.what,
            dtype=task.dtype,
            implementation=task.implementation,
            cold_l2=self.clock.is_cold and is_flushed,
            samples_s=found,
            start_sm_clock_hz=before_hz,
            end_sm_clock_hz=self.sm_clock_hz(),
        )

    def require_working(self) -> None:
        """Raise MeasurementError where the GPU is in an error that every further call would meet."""
        if self.device == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                raise MeasurementError(
                    f"the GPU failed ({str(error).splitlines()[0]}); the measurement is noted as failed, "
                    "go on after it with --resume"
                ) from error

    def _samples_s(self, task: Task) -> tuple[float, ...]:
        implementation = Implementation(task.implementation)
        package = implementation.package
        if package is not None and importlib.util.find_spec(package) is None:
            raise MissingRequirementError(f"{package} is not installed")
        torch.manual_seed(SEED)
        if implementation in COMPILED:
            # past a number of shapes torch would run the function uncompiled, without an error
            torch.compiler.reset()
        what = task.what
        if isinstance(what, Launch):
            if what.layers_of is not None:
                return layers_samples_s(self.launching_toy)
            return bare_samples_s(what.num_kernels, device=self.device)
        if not isinstance(what, Sustained):
            call = _call(what, task.dtype, implementation, self.device)
            before = call.before if isinstance(call, FreshBackward) else None
            return samples_s(call, self.clock, before=before)
        call = _call(what.work, task.dtype, implementation, self.device)
        if what.held_s > 0:
            window_s = _TINY_WINDOW_S if self.is_tiny else WINDOW_S
            return held_samples_s(call, self.clock, what.held_s, window_s=window_s)
        return burst_samples_s(call, self.clock, pause_s=_TINY_PAUSE_S if self.is_tiny else PAUSE_S)

    def sm_clock_hz(self) -> float | None:
        """Of the GPU at this moment; None on a CPU, or where the driver does not say."""
        return device_facts.sm_clock_hz() if self.device == "cuda" else None


def run_tasks(
    sweep: Sweep,
    tasks: Sequence[Task],
    journal: Journal,
    *,
    budget_s: float | None,
    on_task: Callable[[Task], None],
    on_entry: Callable[[Entry], None],
    now_s: Callable[[], float] = time.monotonic,
) -> int:
    """Measure those of `tasks` that `journal` has no entry for, within the budget; how many are left.

    The measurement that the budget ends in is finished. Raises MeasurementError where the GPU fails.
    """
    start_s = now_s()
    missing = [task for task in tasks if task not in journal.done]
    for index, task in enumerate(missing):
        if budget_s is not None and now_s() - start_s >= budget_s:
            return len(missing) - index
        on_task(task)
        entry = sweep.measure(task)
        journal.append(entry)
        on_entry(entry)
        if isinstance(entry, Unmeasured):
            sweep.require_working()
    return 0


def sweep_here(launching_toy: Callable[[int], Recipe], *, is_tiny: bool) -> Sweep:
    """A sweep on this machine's GPU, or on its CPU where it has none and shapes are toys.

    Raises MissingRequirementError for real shapes without a GPU.
    """
    if torch.cuda.is_available():
        return Sweep(device="cuda", clock=CudaClock(), launching_toy=launching_toy, is_tiny=is_tiny)
    if not is_tiny:
        raise MissingRequirementError(
            "calibrate needs a GPU and torch sees none; try the command on this machine with --tiny"
        )
    torch.set_num_threads(1)
    return Sweep(device="cpu", clock=HostClock(), launching_toy=launching_toy, is_tiny=is_tiny)


def gpu_name() -> str:
    """Name of this machine's GPU, as calibration files have it; `cpu` without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else CPU


def provenance_here(
    *, command: tuple[str, ...], environment: Mapping[str, str], source_root: Path
) -> CalibrationProvenance:
    """Where, when and with what the tasks are measured."""
    has_gpu = torch.cuda.is_available()
    return CalibrationProvenance(
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        job_id=job_id_here(environment),
        git=git_state(source_root),
        python_version=platform.python_version(),
        packages=installed_packages(),
        host=socket.gethostname(),
        gpu=device_facts.gpu_facts() if has_gpu else GpuFacts(name=CPU),
        cuda_version=device_facts.cuda_version() if has_gpu else None,
        environment=recorded_environment(environment),
    )


def _call(what: Operation | MoeLayer, dtype: Dtype, implementation: Implementation, device: str) -> Call:
    match what:
        case DenseGemm():
            return dense_call(what, dtype, implementation, device)
        case GroupedGemm():
            return grouped_call(what, dtype, implementation, device)
        case AttentionCore():
            return attention_call(what, dtype, implementation, device)
        case MemoryBound():
            return memory_call(what, dtype, implementation, device)
        case MoeLayer():
            return moe_layer_call(what, dtype, device)
        case _:
            raise MissingRequirementError(f"{what.operation}: not one call")


def _unmeasured(task: Task, reason: str) -> Unmeasured:
    return Unmeasured(what=task.what, dtype=task.dtype, implementation=task.implementation, reason=reason)
