"""Quantised tensors become what they stand for: beside transformers' own code, and a loop over blocks."""

from __future__ import annotations

import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moe_bench.harness.convert.stored import FP8_BLOCK, from_fp8_blocks, from_mxfp4


def test_mxfp4_is_what_transformers_reads() -> None:
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(110, 140, (2, 6, 3), dtype=torch.uint8, generator=generator)
    theirs = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=torch.bfloat16)
    ours = from_mxfp4(blocks, scales)
    assert ours.shape == (2, 96, 6)
    assert torch.equal(ours, theirs)


def test_fp8_blocks_are_scaled_one_by_one() -> None:
    rows, columns = FP8_BLOCK + 3, 2 * FP8_BLOCK
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    scales = torch.tensor([[0.5, 2.0], [3.0, 0.25]])
    found = from_fp8_blocks(weight, scales)
    for row in (0, FP8_BLOCK - 1, FP8_BLOCK, rows - 1):
        for column in (0, FP8_BLOCK - 1, FP8_BLOCK, columns - 1):
            scale = scales[row // FP8_BLOCK, column // FP8_BLOCK]
            assert found[row, column] == (weight[row, column].float() * scale).bfloat16()
