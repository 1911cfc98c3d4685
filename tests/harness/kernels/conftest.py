"""Megatron-Core for the kernel tests: one process with its groups, or several forked ones."""

import contextlib
import multiprocessing
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness.kernels.ranks import Groups, groups_of_one, run_rank

with warnings.catch_warnings():
    # Megatron-Core says at import what is not installed (Transformer Engine, apex, absl).
    warnings.simplefilter("ignore")
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401

RANK_TIMEOUT_S = 120


@pytest.fixture(autouse=True)
def _one_thread_and_one_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu("the same on the device"))])
def each_device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where every tensor of the test is made: on the host and, where there is one, on the GPU."""
    with torch.device(request.param) as device:
        yield device


@pytest.fixture
def groups() -> Iterator[Groups]:
    """Every process group of Megatron-Core, each with this process alone."""
    with groups_of_one() as groups:
        yield groups


@pytest.fixture(scope="session")
def fork_context() -> Any:
    """A server that has imported Megatron-Core and run no tensor operation, and that forks the ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.harness.kernels.preload"])
    return context


@pytest.fixture
def run_ranks(fork_context: Any, tmp_path: Path) -> Callable[..., list[Any]]:
    """Run `function(groups, *args)` in as many processes as `sizes` need, and return what each gave back."""

    def run(function: Callable[..., Any], world_size: int, sizes: dict[str, int], *args: Any) -> list[Any]:
        store = Path(tempfile.mkdtemp(dir=tmp_path)) / "store"
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = fork_context.Pipe(duplex=False)
            process = fork_context.Process(
                target=run_rank, args=(sender, store, rank, world_size, sizes, function, args), daemon=True
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return [_received(pipe) for pipe in pipes]
        finally:
            for process in processes:
                process.join(timeout=10)
                with contextlib.suppress(ProcessLookupError):
                    process.kill()

    return run


def _received(pipe: Any) -> Any:
    assert pipe.poll(RANK_TIMEOUT_S), "a rank did not answer in time"
    outcome, value = pickle.loads(pipe.recv_bytes())
    assert outcome == "done", value
    return value
