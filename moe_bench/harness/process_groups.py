"""Process groups as a context manager: torch's and Megatron-Core's are made together and always destroyed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, Literal

import torch
from megatron.core import parallel_state

from moe_bench.spec.rendezvous import Rendezvous

Backend = Literal["gloo", "nccl"]


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

    `sizes` is `MegatronArguments.parallel_state`. `listen_fd` is a socket that already listens on the
    rendezvous port; rank 0 serves the store on it, so that nobody can take the port before it is used.
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
        initialise_model_parallel(sizes)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        # A process that ends with live groups now and then exits with code 1 (gloo's threads).
        torch.distributed.destroy_process_group()


def initialise_model_parallel(sizes: Mapping[str, Any]) -> None:
    """Divide the ranks into Megatron-Core's groups, from `MegatronArguments.parallel_state`.

    Megatron-Core's default puts the first and last pipeline rank into the embedding group. That is wrong
    where MTP stands elsewhere, whose copy of the embedding would never be set nor reduced, so the group is
    stated, as Megatron-LM's pretrain_gpt.py states it.
    """
    arguments = dict(sizes)
    stages: tuple[int, ...] = arguments.pop("embedding_pipeline_ranks")
    parallel_state.initialize_model_parallel(
        **arguments, get_embedding_ranks=lambda ranks: [ranks[stage] for stage in stages]
    )


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
