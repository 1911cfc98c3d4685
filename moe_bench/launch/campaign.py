"""Runs the steps of a campaign, each as a process of its own, and notes what came of it before the next."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path

from moe_bench.results.campaign import CampaignJournal, Step, StepOutcome
from moe_bench.results.workers import end_with_parent

TIMED_OUT = 124
"""Exit code of a command that its time limit ended, as timeout(1) has it."""
_KILL_WAIT_S = 10.0
_TORCHRUN_FAILED = "torch/distributed/elastic/multiprocessing/api.py"
"""In the first line of torchrun's report of a rank that failed, which stands behind what the rank said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """A step that is to be run."""

    step: Step
    estimated_s: float
    limit_s: float
    """After which it is ended, so that one that hangs does not take the time of all others."""
    absent: str | None
    """What it needs and this machine lacks; it is then noted and not started."""


Run = Callable[[Sequence[str], Path, float], int]
"""Runs a command with its output in a file and a time limit in seconds; its exit code."""


def run_campaign(
    due: Sequence[Due],
    journal: CampaignJournal,
    root: Path,
    *,
    run: Run,
    budget_s: float | None,
    retries: bool = False,
    on_start: Callable[[Due], None],
    on_end: Callable[[StepOutcome], None],
) -> int:
    """Run those of `due` that `journal` has no outcome for; how many the budget has left.

    With `retries` those that failed before are run too, once. A step starts only where its estimate still
    fits the budget; a smaller one behind it may. `root` is the results' root that the steps write below.
    """
    start_s, num_left = time.monotonic(), 0
    done = journal.done - journal.failed if retries else journal.done
    for one in due:
        if one.step.key in done:
            continue
        needed_s = 0.0 if one.absent else one.estimated_s
        if budget_s is not None and time.monotonic() - start_s + needed_s > budget_s:
            num_left += 1
            continue
        on_start(one)
        outcome = _outcome(one, journal, root, run=run)
        journal.append(outcome)
        on_end(outcome)
    return num_left


def _outcome(due: Due, journal: CampaignJournal, root: Path, *, run: Run) -> StepOutcome:
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    if due.absent is not None:
        return StepOutcome(
            step=due.step, exit_code=None, reason=due.absent, started_at=started_at, wall_s=0.0, files=()
        )
    log = journal.log_folder / f"{_file_name(due.step.key)}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    before, start_s = _files(root), time.monotonic()
    exit_code = run(command_of(due.step, root), log, due.limit_s)
    wall_s = time.monotonic() - start_s
    return StepOutcome(
        step=due.step,
        exit_code=exit_code,
        reason=None if exit_code == 0 else _reason(exit_code, log, due.limit_s),
        started_at=started_at,
        wall_s=wall_s,
        files=tuple(sorted(_files(root) - before)),
    )


def command_of(step: Step, root: Path) -> tuple[str, ...]:
    """The command line of `step`, whose records go below `root`."""
    if step.program == "pytest":
        return (sys.executable, "-m", "pytest", *step.arguments)
    return (sys.executable, "-m", "moe_bench", *step.arguments, "--out", str(root))


def run_logged(command: Sequence[str], log: Path, limit_s: float) -> int:
    """Run `command` in a process group of its own with its output in `log`; TIMED_OUT where it took too long.

    The whole group is ended with it, also where this process is interrupted or killed: a rank that stays
    would hold the GPU's memory.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        try:
            return process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return TIMED_OUT
        finally:
            _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=_KILL_WAIT_S)
        except subprocess.TimeoutExpired:
            continue


def _reason(exit_code: int, log: Path, limit_s: float) -> str:
    if exit_code == TIMED_OUT:
        return f"ended after its limit of {limit_s:.0f} s; see {log.name}"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line.strip() for line in takewhile(lambda line: _TORCHRUN_FAILED not in line, lines)]
    return next((line for line in reversed(said) if line), f"exit code {exit_code} without a word")


def _files(root: Path) -> frozenset[str]:
    """What lies below `root`, but what begins with a dot and the logs."""
    found = (path.relative_to(root) for path in root.rglob("*") if path.is_file() and path.suffix != ".log")
    return frozenset(
        path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts)
    )


def _file_name(key: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", key.lower())
