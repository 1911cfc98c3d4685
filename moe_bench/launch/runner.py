"""How a command is run and its output read; tests pass their own."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence

Runner = Callable[[Sequence[str]], subprocess.CompletedProcess[str]]

NOT_INSTALLED = 127
"""Exit code for a command that does not exist, as shells and env(1) have it."""


def run_captured(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run `command` and keep what it prints; a failing exit code is the caller's business."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, NOT_INSTALLED, "", f"{command[0]}: not installed here")


def run_live(command: Sequence[str]) -> int:
    """Run `command` with this process's own output, and give its exit code."""
    return subprocess.run(command, check=False).returncode
