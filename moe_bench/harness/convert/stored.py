"""Reads tensors of a safetensors folder one at a time, quantised ones as what they stand for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moe_bench.checkpoints.safetensors_folder import Logical, Stored

FP8_BLOCK = 128
"""Rows and columns that share a scale in DeepSeek-V3 (weight_block_size of its quantization_config)."""
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of E2M1 without its sign (OCP Microscaling Formats 1.0, 5.3.3)."""
_SCALE_BIAS = 127
"""Of E8M0 (5.4.1)."""


class TensorReader:
    """Files are opened when first needed, and closed by `close_all`: what was read is then freed."""

    def __init__(self, tensors: Mapping[str, Logical]) -> None:
        self._tensors = tensors
        self._stack = contextlib.ExitStack()
        self._open: dict[Path, Any] = {}

    def read(self, name: str) -> Tensor:
        """The tensor of that name, on the host."""
        tensor = self._tensors[name]
        values = [self._stored(stored) for stored in tensor.stored]
        if len(values) == 1:
            return values[0]
        return from_fp8_blocks(*values) if tensor.stored[0].dtype.startswith("F8") else from_mxfp4(*values)

    def close_all(self) -> None:
        """Close the files; the next read opens them again."""
        self._stack.close()
        self._open.clear()

    def _stored(self, stored: Stored) -> Tensor:
        if stored.path not in self._open:
            self._open[stored.path] = self._stack.enter_context(safe_open(stored.path, framework="pt"))
        return self._open[stored.path].get_tensor(stored.name)


@contextlib.contextmanager
def tensor_reader(tensors: Mapping[str, Logical]) -> Iterator[TensorReader]:
    """A reader whose files are closed when the block ends."""
    reader = TensorReader(tensors)
    try:
        yield reader
    finally:
        reader.close_all()


def from_fp8_blocks(weight: Tensor, scale_inv: Tensor) -> Tensor:
    """BF16 [out, in] of FP8 values and one factor for each block of 128 x 128 (arXiv:2412.19437, 3.3.2)."""
    scales = scale_inv.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
    return (weight.float() * scales[: weight.shape[0], : weight.shape[1]]).to(torch.bfloat16)


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """BF16 [experts, in, out] of bytes [experts, out, groups, 16] and exponents [experts, out, groups].

    The low half of a byte is the first value of two; bit 3 is the sign.
    """
    table = torch.tensor([*_FP4_VALUES, *(-value for value in _FP4_VALUES)], dtype=torch.bfloat16)
    experts = []
    for bytes_, exponents in zip(blocks, scales, strict=True):  # one expert at a time, to hold no more
        halves = torch.stack((bytes_ & 0x0F, bytes_ >> 4), dim=-1).flatten(-2)
        powers = exponents.to(torch.int32).unsqueeze(-1) - _SCALE_BIAS
        experts.append(torch.ldexp(table[halves.long()], powers).flatten(-2).T)
    return torch.stack(experts)
