"""Row maps, permutation and its gradients, against sorts and loops in plain torch."""

import pytest
import torch
from torch import Tensor

from moe_bench.harness.kernels.fused.permutation import (
    permute,
    unpermute,
)
from moe_bench.harness.kernels.fused.row_map import RowMap, row_map
from tests.harness.kernels.fused.references import permute_reference, row_map_reference, unpermute_reference
from tests.harness.kernels.fused.routed import routing_map

SMALL = ((37, 12, 3, 40), (5, 1, 1, 8), (300, 3, 2, 8))
"""Tokens, experts, top-k, hidden size: no powers of two, one expert, several blocks of tokens."""
REAL = ((4096, 256, 8, 7168), (8192, 128, 8, 2048), (8192, 128, 4, 2880))
"""DeepSeek-V3, Qwen3-30B and GPT-OSS-120B."""


def shapes(device: str) -> tuple[tuple[int, int, int, int], ...]:
    return SMALL if device == "cpu" else REAL


def routed(shape: tuple[int, int, int, int], device: str) -> tuple[RowMap, int]:
    num_tokens, num_experts, top_k, _ = shape
    entries = (
        routing_map(num_tokens, num_experts, top_k, device=device)
        if num_experts > 1
        else torch.ones(num_tokens, 1, dtype=torch.bool, device=device)
    )
    return row_map(entries, num_slots=min(top_k, num_experts)), int(entries.sum())


def test_rows_are_numbered_expert_by_expert_and_tokens_in_order(device: str) -> None:
    entries = torch.tensor([[0, 1, 1], [1, 0, 1], [0, 0, 0], [0, 1, 0]], dtype=torch.bool, device=device)
    mapped = row_map(entries, num_slots=2).slots
    assert mapped[:, 0].tolist() == [[1, 3], [0, 4], [-1, -1], [2, -1]]
    assert mapped[:, 1].tolist() == [[1, 2], [0, 2], [-1, -1], [1, -1]]


def test_a_row_map_is_that_of_a_stable_sort(device: str) -> None:
    for num_tokens, num_experts, top_k in ((150, 12, 3), (33, 256, 8), (1, 2, 1), (0, 4, 2)):
        entries = routing_map(max(num_tokens, 1), num_experts, min(top_k, num_experts - 1), device=device)
        entries = entries[:num_tokens]
        mapped = row_map(entries, num_slots=top_k).slots
        assert torch.equal(mapped, row_map_reference(entries, num_slots=top_k))


def test_a_map_with_more_entries_than_slots_writes_nothing_beside_them(device: str) -> None:
    entries = torch.ones(3, 4, dtype=torch.bool, device=device)
    assert row_map(entries, num_slots=2).slots[:, 1].tolist() == [[0, 1]] * 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bf16"])
def test_permutation_copies_tokens_and_probabilities(device: str, dtype: torch.dtype) -> None:
    for shape in shapes(device):
        mapped, num_rows = routed(shape, device)
        tokens = torch.randn(shape[0], shape[3], device=device).to(dtype)
        probabilities = torch.rand(shape[0], shape[1], device=device)
        found = permute(tokens, probabilities, mapped, num_rows=num_rows)
        wanted = permute_reference(tokens, probabilities, mapped.slots, num_rows=num_rows)
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bf16"])
def test_the_way_back_adds_up_in_fp32_and_rounds_once(device: str, dtype: torch.dtype) -> None:
    for shape in shapes(device):
        mapped, num_rows = routed(shape, device)
        rows = torch.randn(num_rows, shape[3], device=device).to(dtype)
        found = unpermute(rows, mapped)
        assert found.dtype == dtype
        exact = unpermute_reference(rows.double(), mapped.slots)
        # One rounding of an FP32 sum of up to eight terms; Triton's interpreter cuts off instead.
        rounding = 2**-7 if device == "cpu" else 2**-8
        tolerance = 1e-13 if dtype == torch.float64 else rounding
        torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=8 * 2**-22)


def gradients(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    wanted = [
        torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device, out.dtype)
        for out in outputs
    ]
    return torch.autograd.grad(outputs, inputs, wanted)


def test_gradients_are_those_of_the_reference_in_float64(device: str) -> None:
    shape = SMALL[0]
    mapped, num_rows = routed(shape, device)
    options = {"dtype": torch.float64, "device": device, "requires_grad": True}
    tokens = torch.randn(shape[0], shape[3], **options)
    probabilities = torch.rand(shape[0], shape[1], **options)
    rows = torch.randn(num_rows, shape[3], **options)
    inputs = (tokens, probabilities)
    for found, wanted in (
        (
            gradients(permute(*inputs, mapped, num_rows=num_rows), inputs, 1),
            gradients(permute_reference(*inputs, mapped.slots, num_rows=num_rows), inputs, 1),
        ),
        (
            gradients((unpermute(rows, mapped),), (rows,), 2),
            gradients((unpermute_reference(rows, mapped.slots),), (rows,), 2),
        ),
    ):
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
