"""A calibration as people read it: what would be measured and how long that takes, then what came out."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from moe_bench.projection.calibration.plan import CalibrationPlan, PlannedTask
from moe_bench.projection.evidence.calibrated_constants import CalibratedConstants, sustained_ratio
from moe_bench.report.columns import Columns
from moe_bench.report.figures import GIB, GIGA, MICRO, TERA
from moe_bench.results.calibration import (
    AttentionCore,
    Calibration,
    DenseGemm,
    GroupedGemm,
    Launch,
    Measurement,
    MemoryBound,
    MoeLayer,
    Operation,
    Sustained,
    Task,
)
from moe_bench.results.calibration_journal import Entry

PLAIN_LINES = 20
"""Lines that a long calibration writes into a log, evenly spaced."""


def shape_label(what: Operation | MoeLayer) -> str:
    """What is measured beside its operation's name, in a few words."""
    match what:
        case DenseGemm():
            return f"{what.num_rows} x {what.num_inner} x {what.num_columns}"
        case GroupedGemm():
            groups = what.tokens_per_expert
            target = " += fp32" if what.accumulates_fp32 else ""
            each = f"{groups[0]}" if len(set(groups)) == 1 else f"{min(groups)}..{max(groups)}"
            return f"{what.direction} {len(groups)} x {each} x {what.num_inputs} x {what.num_outputs}{target}"
        case AttentionCore():
            window = f" window {what.window_tokens}" if what.window_tokens else ""
            dims = f"{what.qk_head_dim}/{what.v_head_dim}"
            heads = f"{what.num_heads}:{what.num_query_groups} heads {dims}"
            return f"{what.direction} {what.num_seqs} x {what.seq_len}, {heads}{window}"
        case MemoryBound():
            shape = " x ".join(map(str, what.shape))
            backward = " backward" if what.direction == "backward" else ""
            return f"{what.variant}{backward}, {shape}"
        case Launch():
            return f"{what.num_kernels} kernels" + (f" of {what.layers_of} layers" if what.layers_of else "")
        case MoeLayer():
            experts = f"{what.num_experts} experts of {what.expert_ffn_hidden_size}, top-{what.top_k}"
            return f"{what.num_tokens} x {what.hidden_size}, {experts}"
        case Sustained():
            held = f"held {what.held_s:g} s" if what.held_s else "in bursts"
            return f"{what.work.operation} {held}: {shape_label(what.work)}"


def plan_view(plan: CalibrationPlan) -> RenderableType:
    """Every measurement in the order in which they are made, then sums and what is left out."""
    headings = ("#", "operation", "shape", "dtype", "with", "call us", "s", "GiB", "time", "most in")
    here = [one for one in plan.tasks if one.estimated_s > 0]
    rows = tuple(_plan_row(number, one) for number, one in enumerate(here, start=1))
    right = frozenset({"#", "call us", "s", "GiB", "time"})
    return Group(
        Columns(headings=headings, rows=rows, right=right),
        Text(),
        Columns(
            headings=("operation", "measurements", "s"),
            rows=_sums(here),
            right=frozenset({"measurements", "s"}),
        ),
        Text(),
        *(Text(line) for line in _notes(plan)),
    )


def _plan_row(number: int, one: PlannedTask) -> tuple[str, ...]:
    task = one.task
    return (
        str(number),
        task.what.operation,
        shape_label(task.what),
        task.dtype,
        task.implementation,
        f"{one.call_s / MICRO:.0f}",
        f"{one.estimated_s:.2f}",
        f"{one.memory_bytes / GIB:.2f}",
        f"{one.time_fraction:.2%}" if one.time_fraction else "-",
        one.origin,
    )


def _sums(planned: Sequence[PlannedTask]) -> tuple[tuple[str, ...], ...]:
    numbers = Counter(one.task.what.operation for one in planned)
    seconds = {
        name: sum(one.estimated_s for one in planned if one.task.what.operation == name) for name in numbers
    }
    rows = [(name, str(number), f"{seconds[name]:.0f}") for name, number in numbers.items()]
    return (*rows, ("all", str(len(planned)), f"{sum(seconds.values()):.0f}"))


def _notes(plan: CalibrationPlan) -> Iterator[str]:
    gpu = plan.system.gpu
    name = gpu.device_name if gpu is not None else plan.system.key
    how = "at toy shapes, by a rough rate of any machine" if plan.is_tiny else f"by the laws of {name}"
    yield f"estimated {plan.estimated_s / 60:.1f} min, {how}; memory: what a call moves, and the flush buffer"
    absent = Counter(one.task.implementation for one in plan.tasks if one.estimated_s == 0)
    for implementation, number in absent.items():
        yield f"not installed: {implementation}; the file will name its {number} measurements as absent"
    if plan.over_budget:
        seconds = sum(one.estimated_s for one in plan.over_budget)
        yield f"beyond the budget: {len(plan.over_budget)} measurements, {seconds:.0f} s"
    for one in plan.too_large:
        size = one.memory_bytes / GIB
        yield f"too large: {one.task.what.operation} {shape_label(one.task.what)} needs {size:.1f} GiB"
    if plan.unprojected:
        yield f"no operations known: {', '.join(plan.unprojected)}"


def plan_json(plan: CalibrationPlan) -> dict[str, object]:
    """`plan_view` as JSON, unrounded."""

    def lines(planned: Sequence[PlannedTask]) -> list[dict[str, object]]:
        return [
            {
                **one.task.model_dump(mode="json"),
                "call_s": one.call_s,
                "estimated_s": one.estimated_s,
                "memory_bytes": one.memory_bytes,
                "time_fraction": one.time_fraction,
                "origin": one.origin,
            }
            for one in planned
        ]

    return {
        "system": plan.system.key,
        "is_tiny": plan.is_tiny,
        "estimated_s": plan.estimated_s,
        "tasks": lines(plan.tasks),
        "over_budget": lines(plan.over_budget),
        "too_large": lines(plan.too_large),
        "unprojected": list(plan.unprojected),
    }


def calibration_view(calibration: Calibration, constants: CalibratedConstants) -> RenderableType:
    """Best rates by operation and kernel, what a load does to rates, constants, and what was not measured."""
    gpu = calibration.provenance.gpu.name
    parts: list[RenderableType] = [Text(f"{gpu}: {len(calibration.measurements)} measurements")]
    if not calibration.is_evidence:
        parts.append(Text("toy shapes or no GPU: no projection reads this file"))
    parts += [
        Text(),
        Columns(
            headings=("operation", "with", "dtype", "measured", "best TFLOP/s", "best GB/s"),
            rows=_best(calibration.measurements),
            right=frozenset({"measured", "best TFLOP/s", "best GB/s"}),
        ),
        Text(),
    ]
    for one in calibration.measurements:
        ratio = sustained_ratio(calibration.measurements, one)
        if ratio is not None:
            parts.append(Text(f"{shape_label(one.what)}: {ratio:.3f} of its rate in a burst"))
        if isinstance(one.what, Launch):
            per_kernel = one.median_s / one.what.num_kernels / MICRO
            parts.append(Text(f"{shape_label(one.what)}: {per_kernel:.1f} us each on the host"))
    for name, source in constants.sources.items():
        parts.append(Text(f"constants.{name} = {getattr(constants.constants, name):.4g} ({source})"))
    reasons = Counter((one.implementation, one.reason) for one in calibration.unmeasured)
    for (implementation, reason), number in reasons.items():
        parts.append(Text(f"not measured: {number} with {implementation}: {reason}"))
    return Group(*parts)


def _best(measurements: Sequence[Measurement]) -> tuple[tuple[str, ...], ...]:
    groups: dict[tuple[str, str, str], list[Measurement]] = {}
    for one in measurements:
        groups.setdefault((one.what.operation, one.implementation, one.dtype), []).append(one)
    rows = []
    for key, found in groups.items():
        flops = max((one.flops_per_s or 0.0 for one in found), default=0.0)
        num_bytes = max((one.bytes_per_s or 0.0 for one in found), default=0.0)
        rows.append(
            (
                *key,
                str(len(found)),
                f"{flops / TERA:.3g}" if flops else "-",
                f"{num_bytes / GIGA:.4g}" if num_bytes else "-",
            )
        )
    return tuple(rows)


def calibration_json(calibration: Calibration, path: str) -> dict[str, object]:
    """Path of the calibration's file, and how many measurements are in it."""
    return {
        "path": path,
        "gpu": calibration.provenance.gpu.name,
        "is_evidence": calibration.is_evidence,
        "num_measurements": len(calibration.measurements),
        "num_unmeasured": len(calibration.unmeasured),
    }


Seen = tuple[Callable[[Task], None], Callable[[Entry], None]]
"""Called before a measurement with its task, and after it with what came out."""


@contextlib.contextmanager
def calibration_progress(num_tasks: int, num_done: int, console: Console) -> Iterator[Seen]:
    """Follow the measurements: with a bar on a terminal, else with a few plain lines."""
    if not console.is_terminal:
        yield _plain(num_tasks, num_done, console)
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as progress:
        bar = progress.add_task("starting", total=num_tasks, completed=num_done)

        def started(task: Task) -> None:
            progress.update(bar, description=f"{task.what.operation} {shape_label(task.what)}"[:60])

        def ended(entry: Entry) -> None:
            del entry
            progress.advance(bar)

        yield started, ended


def _plain(num_tasks: int, num_done: int, console: Console) -> Seen:
    stride = max(1, num_tasks // PLAIN_LINES)
    seen = [num_done]

    def ended(entry: Entry) -> None:
        seen[0] += 1
        if seen[0] % stride == 0 or seen[0] == num_tasks:
            label = f"{entry.what.operation} {shape_label(entry.what)}"
            console.print(f"{seen[0]}/{num_tasks} {label}", highlight=False)

    return (lambda task: None), ended
