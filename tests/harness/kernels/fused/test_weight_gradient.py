"""Weight gradients added to the buffer against products in float64, over groups of every length."""

import torch

from moe_bench.harness.kernels.fused.weight_gradient import (
    HOPPER,
    TileShape,
    accumulate_weight_gradient,
)
from tests.harness.kernels.fused.references import accumulate_weight_gradient_reference

SMALL = TileShape(rows=16, outputs=32, inputs=32, band=2, num_warps=4, num_stages=2)


def test_every_expert_gets_its_own_rows_on_top_of_what_was_there(device: str) -> None:
    """Groups shorter than a block, of whole blocks, of neither, and none; widths that no tile divides."""
    is_small = device == "cpu"
    counts = torch.tensor([7, 0, 32, 37] if is_small else [8000, 0, 8192, 333])
    widths = ((48, 80), (40, 24)) if is_small else ((4096, 7168), (7168, 2048), (5760, 2880))
    # The interpreter multiplies BF16 as integers (triton 3.9, runtime/interpreter.py, create_dot).
    dtype = torch.float16 if is_small else torch.bfloat16
    offsets = counts.cumsum(0).int().to(device)
    for out_features, in_features in widths:
        grad = torch.randn(int(counts.sum()), out_features, device=device).to(dtype)
        x = torch.randn(int(counts.sum()), in_features, device=device).to(dtype)
        main_grad = torch.randn(len(counts), out_features, in_features, device=device)
        exact = main_grad.double()
        accumulate_weight_gradient_reference(exact, grad, x, offsets)
        untouched = main_grad[1].clone()
        accumulate_weight_gradient(main_grad, grad, x, offsets, tile=SMALL if is_small else HOPPER)
        # FP32 sums of as many products as the longest group has rows.
        tolerance = int(counts.max()) ** 0.5 * 2**-20
        torch.testing.assert_close(main_grad.double(), exact, rtol=2**-18, atol=tolerance)
        assert torch.equal(main_grad[1], untouched)


def test_a_buffer_in_bf16_is_rounded_once(device: str) -> None:
    grad, x = torch.ones(3, 32, device=device).half(), torch.ones(3, 32, device=device).half()
    main_grad = torch.full((1, 32, 32), 256.0, device=device, dtype=torch.bfloat16)
    offsets = torch.tensor([3], dtype=torch.int32, device=device)
    accumulate_weight_gradient(main_grad, grad, x, offsets, tile=SMALL)
    # 256 + 3: neighbours are 258 and 260 (2 apart), and three additions of 1 would stay at 256.
    assert main_grad.unique().tolist() in ([258.0], [260.0])


def test_a_next_experts_infinities_do_not_reach_this_one(device: str) -> None:
    x = torch.ones(5, 32, device=device).half()
    x[3:] = float("inf")
    main_grad = torch.zeros(2, 32, 32, device=device)
    offsets = torch.tensor([3, 5], dtype=torch.int32, device=device)
    accumulate_weight_gradient(main_grad, torch.ones_like(x), x, offsets, tile=SMALL)
    assert main_grad[0].unique().tolist() == [3.0]
    assert main_grad[1].isinf().all()
