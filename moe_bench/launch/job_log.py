"""What the output of a job says of its end, in the words of PyTorch, NCCL and Slurm."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from moe_bench.launch.job_state import JobState

MAX_READ_BYTES = 16 * 2**20
"""From the end: what ended a job stands there, and a log may have gigabytes."""
MAX_LINE = 240

_SIGNS = (
    # torch (CUDACachingAllocator.cpp, alloc_cpu.cpp), the CUDA runtime, NCCL (checks.h), slurmstepd and srun
    (
        JobState.OUT_OF_MEMORY,
        re.compile(
            r"(CUDA|HIP|XPU) out of memory|OutOfMemoryError"
            r"|(CUDA error|Cuda failure.*): ?'?out of memory|Cuda failure \d* ?'out of memory'"
            r"|DefaultCPUAllocator: (can't allocate|not enough) memory"
            r"|[Dd]etected \d+ oom[_-]kill event|: task [\d,-]+: Out Of Memory|OOM Killed"
        ),
    ),
    (JobState.TIMED_OUT, re.compile(r"\*\*\* (JOB|STEP) .* CANCELLED AT .* DUE TO TIME LIMIT")),
    (JobState.CANCELLED, re.compile(r"\*\*\* (JOB|STEP) .* CANCELLED AT \S+ \*\*\*")),
)
_NEXT_LIFE = re.compile(
    r"CANCELLED AT .* DUE TO (JOB REQUEUE|NODE FAILURE|PREEMPTION)|; the job is queued again$"
)
"""Where a log, to which every life of a job is appended, goes on with the next one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEnd:
    """The end of a job's last life as its output has it."""

    state: JobState | None
    """None where nothing says how it ended."""
    line: str
    """That says so, or else the last one."""


def log_end(path: Path) -> LogEnd | None:
    """What the output in `path` says; None where there is no such file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - MAX_READ_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return None
    found: dict[JobState, str] = {}
    last = ""
    for line in map(str.strip, text.splitlines()):
        last = line or last
        if _NEXT_LIFE.search(line):
            found.clear()
        for state, sign in _SIGNS:
            if state not in found and sign.search(line):
                found[state] = line
    told = next((state for state, _ in _SIGNS if state in found), None)
    return LogEnd(state=told, line=(last if told is None else found[told])[:MAX_LINE])
