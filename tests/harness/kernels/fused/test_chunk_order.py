"""The order of local experts against torch's split and cat."""

import torch

from moe_bench.harness.kernels.fused.chunk_order import (
    sort_rows,
    source_rows,
    unsort_rows,
)
from tests.harness.kernels.fused.references import source_rows_reference


def counts(device: str) -> torch.Tensor:
    """Senders by local experts, some without rows."""
    if device == "cpu":
        return torch.tensor([[3, 0, 2], [0, 0, 4], [35, 1, 0], [0, 7, 0]])
    return torch.randint(0, 1000, (64, 4)).to(device)


def test_sources_are_those_of_split_and_cat(device: str) -> None:
    sizes = counts(device)
    sources = source_rows(sizes, num_rows=int(sizes.sum()), device=sizes.device)
    assert torch.equal(sources, source_rows_reference(sizes))


def test_sorting_moves_rows_and_probabilities_and_unsorting_moves_them_back(device: str) -> None:
    sizes = counts(device)
    num_rows, hidden_size = int(sizes.sum()), 40 if device == "cpu" else 7168
    sources = source_rows(sizes, num_rows=num_rows, device=sizes.device)
    rows = torch.randn(num_rows, hidden_size, device=device, requires_grad=True)
    probabilities = torch.randn(num_rows, device=device, requires_grad=True)
    sorted_rows, sorted_probabilities = sort_rows(rows, probabilities, sources)
    assert torch.equal(sorted_rows, rows[sources.long()])
    assert torch.equal(sorted_probabilities, probabilities[sources.long()])
    assert torch.equal(unsort_rows(sorted_rows, sources), rows)

    grads = torch.randn_like(rows), torch.randn_like(probabilities)
    grad_rows, grad_probabilities = torch.autograd.grad(
        (sorted_rows, sorted_probabilities), (rows, probabilities), grads
    )
    assert torch.equal(grad_rows[sources.long()], grads[0])
    assert torch.equal(grad_probabilities[sources.long()], grads[1])
    unsorted_grad = torch.autograd.grad(unsort_rows(rows, sources), rows, grads[0])[0]
    assert torch.equal(unsorted_grad, grads[0][sources.long()])


def test_no_rows_are_no_work(device: str) -> None:
    sources = source_rows(torch.zeros(2, 3, dtype=torch.long), num_rows=0, device=torch.device(device))
    rows, probabilities = sort_rows(torch.empty(0, 8, device=device), torch.empty(0, device=device), sources)
    assert rows.shape == (0, 8)
    assert probabilities.shape == (0,)
