"""The activation's kernels against its plain code in float64, and at real shapes on a GPU."""

import pytest
import torch

from moe_bench.harness.kernels.activation import GatedActivation, gated_backward, gated_forward
from moe_bench.harness.kernels.fused.activation import TritonGatedActivation

KINDS = {
    "swiglu": TritonGatedActivation(alpha=1.0),
    "gpt_oss": TritonGatedActivation(alpha=1.702, offset=1.0, clamp=0.7),
}


def numbers(kind: GatedActivation) -> tuple[float, float, float | None]:
    return kind.alpha, kind.offset, kind.clamp


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bf16"])
def test_both_passes_are_those_of_the_plain_code(device: str, dtype: torch.dtype, kind: str) -> None:
    activation = KINDS[kind]
    for num_rows, ffn in ((5, 40), (3, 1100)) if device == "cpu" else ((32768, 2048), (8192, 2880)):
        x = torch.randn(num_rows, 2 * ffn, device=device).to(dtype)
        probabilities = torch.rand(num_rows, device=device)
        grad = torch.randn(num_rows, ffn, device=device).to(dtype)
        found = activation.forward(x, probabilities), *activation.backward(grad, x, probabilities)
        wide = x.double(), probabilities.double()
        wanted = (
            gated_forward(*wide, *numbers(activation)),
            *gated_backward(grad.double(), *wide, *numbers(activation)),
        )
        # One rounding to BF16, which Triton's interpreter cuts off; sums over F terms in FP32.
        rounding = 2**-7 if device == "cpu" else 2**-8
        tolerance = 1e-6 if dtype == torch.float64 else rounding
        for ours, exact in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=ffn**0.5 * 2**-20)


def test_what_is_not_a_number_stays_so_through_the_clamp(device: str) -> None:
    x = torch.full((1, 16), float("nan"), device=device)
    assert KINDS["gpt_oss"].forward(x, torch.ones(1, device=device)).isnan().all()


def test_no_rows_are_no_work(device: str) -> None:
    x, probabilities = torch.empty(0, 16, device=device), torch.empty(0, device=device)
    assert KINDS["swiglu"].forward(x, probabilities).shape == (0, 8)
    grad_x, grad_probabilities = KINDS["swiglu"].backward(torch.empty(0, 8, device=device), x, probabilities)
    assert grad_x.shape == (0, 16)
    assert grad_probabilities.shape == (0,)
