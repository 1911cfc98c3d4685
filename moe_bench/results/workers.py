"""The same work on many files, by several processes where there are enough of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence

MIN_FILES = 256
"""Below this the start of processes takes longer than the files."""
MAX_WORKERS = 8
CHUNK = 8


def over_files[File, Found](work: Callable[[File], Found], files: Sequence[File]) -> Iterator[Found]:
    """`work` of each file, in no order; `work` is a function of a module, sent to other processes by name."""
    if len(files) < MIN_FILES:
        yield from map(work, files)
        return
    # started by a server that has only imported `work`, not copied from this process, which may run threads
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    with context.Pool(min(MAX_WORKERS, len(os.sched_getaffinity(0))), _leave_interrupts) as pool:
        yield from pool.imap_unordered(work, files, chunksize=CHUNK)


def _leave_interrupts() -> None:
    """An interrupt from the keyboard reaches all processes, and the first one ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
