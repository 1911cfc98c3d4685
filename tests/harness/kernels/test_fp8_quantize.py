"""FP8 with a scale per row: the kernels, under Triton's interpreter and on a GPU, against rows in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_bench.harness.kernels.fp8_quantize import Quantized, quantize_columns, quantize_rows
from tests.harness.kernels.fp8_references import columns_reference, decoded, rows_reference

REFERENCES = {"rows": rows_reference, "columns": columns_reference}


def inputs() -> dict[str, torch.Tensor]:
    """By the function that takes them: sizes that fill no block, and rows that are easy to get wrong."""
    odd = torch.randn(5, 40)
    odd[0] = 0
    odd[1] = 448 * 2.0**-7  # the largest e4m3 number itself
    odd[2] = 449 * 2.0**-7  # just too large for that scale
    odd[3] *= 1e-42  # FP32 numbers below the least normal one
    odd[4, 7] = float("inf")
    spread = torch.randn(3, 50, 70) * torch.logspace(-3, 3, 70)
    return {
        "rows of bf16": torch.randn(6, 96).bfloat16(),
        "rows of matrices": torch.randn(3, 4, 33),
        "rows that are odd": odd,
        "rows that are not contiguous": torch.randn(40, 6).t(),
        "columns of bf16": spread.bfloat16(),
        "columns over several tiles": torch.randn(2, 200, 130),
    }


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What the kernels make of `inputs` on this host; the interpreter is chosen when Triton is imported."""
    folder: Path = tmp_path_factory.mktemp("fp8")
    torch.manual_seed(0)
    torch.save(inputs(), folder / "inputs.pt")
    command = [sys.executable, "-m", "tests.harness.kernels.interpreted_fp8"]
    files = [str(folder / "inputs.pt"), str(folder / "outputs.pt")]
    subprocess.run([*command, *files], check=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = torch.load(folder / "outputs.pt")
    return found


@pytest.mark.parametrize("name", inputs())
def test_the_kernels_scale_and_round_as_one_row_at_a_time(
    name: str, interpreted: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    torch.manual_seed(0)
    expected = REFERENCES[name.split()[0]](inputs()[name])
    values, scales = interpreted[name]
    assert torch.equal(scales, expected.scales)
    torch.testing.assert_close(values.float(), expected.values.float(), rtol=0, atol=0, equal_nan=True)


def test_a_quantized_number_is_off_by_a_sixteenth_of_itself_at_most(
    interpreted: dict[str, tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Half a step of three mantissa bits, and half of the least e4m3 number near zero: 2^-10 of the scale."""
    torch.manual_seed(0)
    x, quantized = inputs()["rows of bf16"].double(), Quantized(*interpreted["rows of bf16"])
    bound = torch.maximum(x.abs() / 16, quantized.scales[:, None] * 2.0**-10)
    assert ((decoded(quantized) - x).abs() <= bound).all()
    largest = quantized.values.float().abs().amax(dim=1)
    assert ((largest >= 224) & (largest <= 448)).all()


def test_infinity_in_a_row_is_still_seen_in_its_product() -> None:
    row = torch.tensor([[1.0, float("inf"), 2.0]])
    assert not torch.isfinite(decoded(rows_reference(row)).sum())


@pytest.mark.gpu("Triton compiles for GPUs; here its interpreter runs the kernels")
@pytest.mark.parametrize("name", inputs())
def test_the_compiled_kernels_scale_and_round_as_one_row_at_a_time(name: str) -> None:
    x = inputs()[name]
    function = quantize_rows if name.startswith("rows") else quantize_columns
    found, expected = function(x.cuda()), REFERENCES[name.split()[0]](x)
    assert torch.equal(found.scales.cpu(), expected.scales)
    torch.testing.assert_close(
        found.values.float().cpu(), expected.values.float(), rtol=0, atol=0, equal_nan=True
    )
