"""What the 4-bit formats make of a tensor on the CPU, against their definition, and what they weigh."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed: pip install 'moe_bench[modelopt]'")

from moe_bench.harness.quantize.formats import STORAGE, round_mxfp4, round_nvfp4
from moe_bench.spec.recipe import QuantFormat

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
"""OCP Microscaling Formats 1.0, 5.3.3."""


def nearest(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The closest signed E2M1 value times the scale of its block."""
    grid = torch.tensor(sorted({sign * value for sign, value in itertools.product((-1, 1), E2M1)}))
    chosen = ((values / scales).unsqueeze(-1) - grid).abs().argmin(dim=-1)
    return grid[chosen] * scales


def random_rows() -> torch.Tensor:
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(1)) * 0.02


def test_mxfp4_is_the_nearest_value_under_a_power_of_two_for_each_block_of_32() -> None:
    values = random_rows()
    blocks = values.view(5, 2, 32)
    # the smallest power of two under which no value is cut off, which is modelopt's choice
    scales = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax(dim=-1, keepdim=True) / 6)))
    torch.testing.assert_close(round_mxfp4(values), nearest(blocks, scales).view(5, 64), rtol=0, atol=0)


def test_nvfp4_is_the_nearest_value_under_an_e4m3_scale_for_each_block_of_16() -> None:
    values = random_rows()
    blocks = values.view(5, 4, 16)
    whole = values.abs().max() / (6 * 448)
    exact = blocks.abs().amax(dim=-1, keepdim=True) / 6 / whole
    scales = exact.to(torch.float8_e4m3fn).float() * whole
    torch.testing.assert_close(round_nvfp4(values, values.abs().max()), nearest(blocks, scales).view(5, 64))


def test_what_is_beyond_the_calibrated_maximum_is_cut_off() -> None:
    values = random_rows()
    calibrated = values.abs().max() / 4
    assert round_nvfp4(values, calibrated).abs().max() == pytest.approx(float(calibrated))


@pytest.mark.parametrize(("format", "num_bytes"), [("fp8", 68), ("nvfp4", 40), ("mxfp4", 34)])
def test_a_weight_of_2_by_32_weighs_its_values_and_scales(format: QuantFormat, num_bytes: int) -> None:
    # 64 values of 8 or 4 bits; one FP32 scale; four E4M3 scales and one FP32 scale; two E8M0 scales
    assert STORAGE[format].num_bytes(64, num_tensors=1) == num_bytes
