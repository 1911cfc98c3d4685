"""Whether records are whole and agree with themselves, and whether one run is there twice."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from moe_bench.results.entry import Entry
from moe_bench.results.record import Record
from moe_bench.results.store import read_record
from moe_bench.results.versioned import RecordError


def file_problems(path: Path) -> tuple[str, ...]:
    """One line for each thing wrong with the record in `path`; the file is named in front."""
    try:
        record = read_record(path)
    except RecordError as error:
        return (str(error),)
    return tuple(f"{path}: {problem}" for problem in record_problems(record))


def record_problems(record: Record) -> Iterator[str]:
    """What is wrong with the numbers of `record`."""
    yield from _size_problems(record)
    samples = record.samples
    for name in ("warmup_step_times_s", "step_times_s"):
        if any(
            not time_s > 0 or math.isinf(time_s) for times_s in getattr(samples, name) for time_s in times_s
        ):
            yield f"samples.{name}: a time that is none"
    for name in ("losses", "grad_norms"):
        if not all(map(math.isfinite, getattr(samples, name))):
            yield f"samples.{name}: not finite; such a run gives no number"


def duplicate_problems(entries: Iterable[Entry]) -> Iterator[str]:
    """One line for each file that holds the run of another: it would count as a repeat."""
    seen: dict[tuple[object, ...], Entry] = {}
    for entry in entries:
        run = (entry.recipe, entry.scale, entry.started_at, entry.job_id, entry.repeat, entry.step_time_s)
        first = seen.setdefault(run, entry)
        if first is not entry:
            yield f"{entry.path}: the same run as {first.path}; remove one"


def _size_problems(record: Record) -> Iterator[str]:
    samples, num_ranks = record.samples, record.num_ranks
    if not num_ranks or not samples.warmup_step_times_s:
        yield "samples.step_times_s: no ranks"
        return
    if num_ranks != record.plan.num_ranks:
        yield f"samples.step_times_s: {num_ranks} ranks, the plan has {record.plan.num_ranks}"
    of_ranks = {
        "samples.warmup_step_times_s": samples.warmup_step_times_s,
        "samples.peak_memory_bytes": samples.peak_memory_bytes,
        "samples.energy_j": samples.energy_j,
        "provenance.hosts": record.provenance.hosts,
        "provenance.gpus": record.provenance.gpus or None,
    }
    for name, values in of_ranks.items():
        if values is not None and len(values) != num_ranks:
            yield f"{name}: {len(values)} values, there are {num_ranks} ranks"
    num_warmup, num_timed = len(samples.warmup_step_times_s[0]), len(samples.step_times_s[0])
    for name, series, num_steps in (
        ("warmup_step_times_s", samples.warmup_step_times_s, num_warmup),
        ("step_times_s", samples.step_times_s, num_timed),
    ):
        if {len(times_s) for times_s in series} != {num_steps}:
            yield f"samples.{name}: ranks differ in their number of steps"
    of_steps = {
        "losses": (len(samples.losses), num_warmup + num_timed if record.has_loss else 0),
        "grad_norms": (len(samples.grad_norms), num_warmup + num_timed),
        "tokens_per_expert": (len(samples.tokens_per_expert), num_timed),
    }
    for name, (found, expected) in of_steps.items():
        if found != expected:
            yield f"samples.{name}: {found} values, there are {expected} steps"
