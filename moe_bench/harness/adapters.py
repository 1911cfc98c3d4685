"""Low-rank adapters (arXiv:2106.09685): their keys in a checkpoint, and how a model gets them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch

from moe_bench.harness.start import require_package

NAME = "moe_bench"
_MATRICES = (f".lora_a_{NAME}.", f".lora_b_{NAME}.")
FIRST = f"{_MATRICES[0]}weight"
"""End of the key of the matrix [rank, in] that a projection's input meets."""
SECOND = f"{_MATRICES[1]}weight"
"""End of that of [out, rank], which begins at zero."""

Adapt = Callable[[Iterable[torch.nn.Module]], None]
"""Gives chunks of a model their adapters."""


def is_adapter(key: str) -> bool:
    """Whether a key of a checkpoint is one of an adapter."""
    return any(matrix in key for matrix in _MATRICES)


def adapter_rank(shapes: Iterable[tuple[str, Sequence[int]]]) -> int | None:
    """That of the adapters among the tensors of a checkpoint, by key and shape; None where there are none."""
    return next((int(shape[0]) for key, shape in shapes if key.endswith(FIRST)), None)


def adapters_of(rank: int) -> Adapt:
    """What gives a model adapters of that rank; MissingRequirementError without nvidia-modelopt.

    To be called before this process stands in for a GPU (`host_device`): torch's compiler, which
    nvidia-modelopt loads, lists torch's functions, and does not bear that two are the same.
    """
    require_package("modelopt", extra="modelopt")
    from moe_bench.harness.lora import put_adapters

    return partial(put_adapters, rank=rank)
