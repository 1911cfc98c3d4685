"""Grouped products: offsets, one-hot rows, layouts, empty inputs and refused widths."""

from typing import Any

import pytest
import torch

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.kernels import grouped_linear as module
from moe_bench.harness.kernels.grouped_linear import (
    PLAIN,
    group_offsets,
    grouped_linear,
    membership,
    stacked,
)

CPU = torch.device("cpu")


def test_offsets_are_the_ends_of_the_groups() -> None:
    offsets = group_offsets(torch.tensor([3, 0, 2]), CPU)
    assert offsets.tolist() == [3, 3, 5]
    assert offsets.dtype == torch.int32


def test_rows_belong_to_the_group_that_holds_them_and_padding_to_none() -> None:
    members = membership(torch.tensor([2, 2, 3], dtype=torch.int32), 4, torch.float32)
    assert members.tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0]]


def test_the_weight_gradient_cuts_no_contiguous_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hopper's kernel wants groups of a multiple of 8 rows only where the cut dimension has stride 1.

    The gradient that arrives is an expanded one, as after sum(): all strides 0.
    """
    seen: list[tuple[Any, ...]] = []
    original = module.grouped_mm

    def recorded(a: torch.Tensor, b: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        seen.append((a, b))
        return original(a, b, offs=offs)

    monkeypatch.setattr(module, "grouped_mm", recorded)
    x = torch.randn(5, 8, requires_grad=True)
    weight = torch.randn(2, 16, 8, requires_grad=True)
    grouped_linear(x, (weight,), torch.tensor([3, 5], dtype=torch.int32)).sum().backward()
    products = [(a, b) for a, b in seen if b.dim() == 2]
    assert [(a.shape, b.shape) for a, b in products] == [((16, 5), (5, 8))]
    for a, b in products:
        assert (a.stride(1), b.stride(0)) == (16, 8)


def test_an_empty_input_gives_every_weight_a_zero_gradient() -> None:
    x, weight = torch.empty(0, 8, requires_grad=True), torch.randn(2, 16, 8, requires_grad=True)
    output = grouped_linear(x, (weight,), torch.tensor([0, 0], dtype=torch.int32))
    output.sum().backward()
    assert output.shape == (0, 16)
    assert weight.grad is not None
    assert not weight.grad.any()


def test_an_expert_without_tokens_gets_a_zero_gradient() -> None:
    x, weight = torch.randn(5, 8), torch.randn(3, 16, 8, requires_grad=True)
    grouped_linear(x, (weight,), torch.tensor([3, 3, 5], dtype=torch.int32)).sum().backward()
    assert weight.grad[0].any()
    assert not weight.grad[1].any()
    assert weight.grad[2].any()


def test_rows_that_are_no_multiple_of_16_bytes_are_refused() -> None:
    PLAIN.check_widths(dtype=torch.bfloat16, hidden_size=8)
    PLAIN.check_widths(dtype=torch.float32, hidden_size=4)
    with pytest.raises(MissingRequirementError, match=r"hidden_size 4 .*multiple of 8"):
        PLAIN.check_widths(dtype=torch.bfloat16, hidden_size=4)


def test_matrices_that_follow_one_another_in_memory_are_not_copied() -> None:
    buffer = torch.randn(2 + 3 * 4 * 8)
    matrices = [buffer[2 + expert * 32 :][:32].view(4, 8) for expert in range(3)]
    whole = stacked(matrices)
    assert torch.equal(whole, torch.stack(matrices))
    assert whole.data_ptr() == matrices[0].data_ptr()
    assert stacked([whole]) is whole


@pytest.mark.parametrize("case", ["gaps", "another order", "another buffer", "transposed"])
def test_other_matrices_are_copied_together(case: str) -> None:
    buffer = torch.arange(128.0)
    first, second = buffer[:32].view(4, 8), buffer[32:64].view(4, 8)
    matrices = {
        "gaps": [first, buffer[40:72].view(4, 8)],
        "another order": [second, first],
        "another buffer": [first, buffer.clone()[32:64].view(4, 8)],
        "transposed": [buffer[:64].view(8, 8).t(), buffer[64:].view(8, 8).t()],
    }[case]
    assert torch.equal(stacked(matrices), torch.stack(matrices))
    assert stacked(matrices).data_ptr() != matrices[0].data_ptr()
