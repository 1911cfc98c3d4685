"""The processes beside a rank that write its checkpoints: they end with it, and say why they failed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from logging.handlers import QueueHandler
from multiprocessing import get_context
from multiprocessing.managers import SyncManager
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from moe_bench.harness.substitution import Substitution, substituted
from moe_bench.results.workers import end_with_parent


@dataclass(frozen=True, slots=True)
class Writers:
    """What the writers of one rank share."""

    _problems: Any
    """Queue of log records."""

    def bound(self, request: AsyncRequest) -> AsyncRequest:
        """`request` whose process ends with this rank and whose errors can be asked for."""
        if request.async_fn is None:  # this rank has nothing to write
            return request
        # not among its arguments, of which Megatron-Core counts on the order (async_utils.py, preload_fn)
        return request._replace(async_fn=partial(_write, request.async_fn, self._problems))

    def problems(self) -> tuple[str, ...]:
        """What the writers had to say since they were asked last."""
        return tuple(self._problems.get().getMessage() for _ in range(self._problems.qsize()))


@contextlib.contextmanager
def writers() -> Iterator[Writers]:
    """Hold the process through which writers answer, until the block ends.

    Megatron-Core starts one for each rank that it never ends (filesystem_async.py,
    get_write_results_queue), and that a killed rank leaves behind. Its own is spawned, and imports torch anew
    to hand on what is of torch's types; this one is forked, as Megatron-Core forks the writers.
    """
    manager = SyncManager(ctx=get_context("fork"))
    manager.start(end_with_parent)
    with manager, substituted(Substitution(filesystem_async, "_results_queue", manager.Queue())):
        yield Writers(manager.Queue())


def _write(write: Callable[..., None], problems: Any, *arguments: Any) -> None:
    """Body of a writer. What it logs is the only place where Megatron-Core names the error."""
    end_with_parent()
    log = logging.getLogger(filesystem_async.__name__)
    log.addHandler(QueueHandler(problems))
    log.propagate = False
    write(*arguments)
