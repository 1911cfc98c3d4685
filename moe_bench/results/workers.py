"""Processes that this one starts: the same work on many files, and an end together with their parent."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

MIN_FILES = 256
"""Below this the start of processes takes longer than the files."""
MAX_WORKERS = 8
CHUNK = 8
_PR_SET_PDEATHSIG = 1
"""linux/prctl.h"""


def over_files[File, Found](work: Callable[[File], Found], files: Sequence[File]) -> Iterator[Found]:
    """`work` of each file, in no order; `work` is a function of a module, sent to other processes by name."""
    if len(files) < MIN_FILES:
        yield from map(work, files)
        return
    # started by a server that has only imported `work`, not copied from this process, which may run threads
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    with context.Pool(min(MAX_WORKERS, len(os.sched_getaffinity(0))), _fall_silent) as pool:
        yield from pool.imap_unordered(work, files, chunksize=CHUNK)


def end_with_parent() -> None:
    """Have the kernel kill the calling process as soon as the one that started it has ended."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _fall_silent() -> None:
    """Leave it to the first process to say what happened: it gets every error, and what ends it ends all."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
