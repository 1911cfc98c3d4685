"""Process groups as a context manager: torch's and Megatron-Core's are made together and always destroyed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from megatron.core import parallel_state

Backend = Literal["gloo", "nccl"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Which rank this process is, and where the ranks of the job meet."""

    rank: int
    world_size: int
    local_rank: int
    """Number of this process on its host; the GPU that it uses."""
    master_addr: str
    master_port: int


@contextlib.contextmanager
def process_groups(
    rendezvous: Rendezvous,
    *,
    backend: Backend,
    sizes: Mapping[str, Any],
    timeout_s: float = 600.0,
    listen_fd: int | None = None,
) -> Iterator[None]:
    """Join the job and divide it into Megatron-Core's groups, until the block ends.

    `sizes` are the arguments of `megatron.core.parallel_state.initialize_model_parallel`. `listen_fd` is a
    socket that already listens on the rendezvous port; rank 0 serves the store on it, so that no port can be
    taken between choosing and using it.
    """
    timeout = timedelta(seconds=timeout_s)
    address = f"tcp://{rendezvous.master_addr}:{rendezvous.master_port}"
    ranks: dict[str, Any] = {"rank": rendezvous.rank, "world_size": rendezvous.world_size}
    if listen_fd is None:
        torch.distributed.init_process_group(backend, init_method=address, timeout=timeout, **ranks)
    else:
        store = _inherited_store(rendezvous, listen_fd, timeout)
        torch.distributed.init_process_group(backend, store=store, timeout=timeout, **ranks)
    try:
        parallel_state.initialize_model_parallel(**sizes)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        # A process that ends with live groups now and then exits with code 1 (gloo's threads).
        torch.distributed.destroy_process_group()


def _inherited_store(
    rendezvous: Rendezvous, listen_fd: int, timeout: timedelta
) -> torch.distributed.TCPStore:
    """Meet at a socket that the parent process opened before it forked the ranks."""
    is_server = rendezvous.rank == 0
    return torch.distributed.TCPStore(
        rendezvous.master_addr,
        rendezvous.master_port,
        world_size=rendezvous.world_size,
        is_master=is_server,
        timeout=timeout,
        master_listen_fd=listen_fd if is_server else None,
    )
