"""One rank of a test: its process groups, its host device, and the way back of its result."""

import contextlib
import pickle
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

Groups = Any


@contextlib.contextmanager
def joined(store: Path, rank: int, world_size: int, sizes: dict[str, int]) -> Iterator[Groups]:
    """Megatron-Core's process groups over gloo, on a machine whose CUDA calls mean the host."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from moe_bench.harness.host_device import host_device

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
    )
    try:
        with host_device(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parallel_state.initialize_model_parallel(**sizes)
            model_parallel_cuda_manual_seed(1)
            yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def groups_of_one() -> Iterator[Groups]:
    """Every group with this process alone."""
    with tempfile.TemporaryDirectory() as folder, joined(Path(folder) / "store", 0, 1, {}) as groups:
        yield groups


def run_rank(
    sender: Any,
    store: Path,
    rank: int,
    world_size: int,
    sizes: dict[str, int],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """Send back what the function returns, or its traceback."""
    try:
        with joined(store, rank, world_size, sizes) as groups:
            _send(sender, ("done", function(groups, *args)))
    except Exception:  # noqa: BLE001  Whatever went wrong in the rank is the test's failure.
        _send(sender, ("failed", traceback.format_exc()))


def without_groups(rank: int = 0, **sizes: int) -> SimpleNamespace:
    """Stand-ins for groups of the given sizes, seen from `rank` in each; no collective can run on them."""
    names = ("tp", "cp", "pp", "ep", "expt_tp", "expt_dp")
    return SimpleNamespace(**{name: _stand_in(sizes.get(name, 1), rank) for name in names})


def _stand_in(size: int, rank: int) -> SimpleNamespace:
    return SimpleNamespace(size=lambda: size, rank=lambda: rank if size > 1 else 0)


def _send(sender: Any, answer: tuple[str, Any]) -> None:
    """By value: `send` would hand over descriptors of shared memory, which end with this process."""
    sender.send_bytes(pickle.dumps(answer))
