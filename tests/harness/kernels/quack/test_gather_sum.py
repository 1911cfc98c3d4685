"""The Triton kernels, interpreted or on a GPU: sums of a token's rows against float64, numbers of rows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_bench.harness.kernels.quack.gather_sum import gather_sum, gather_sum_reference
from moe_bench.harness.kernels.quack.rows import rows_of_routing_map

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def inputs() -> list[Inputs]:
    """Weighted and not, of one slot and several, wider than a program and narrower, and of no tokens."""
    cases: list[Inputs] = []
    for num_tokens, num_slots, hidden, has_weights in (
        (12, 2, 1100, True),
        (12, 2, 1100, False),
        (9, 1, 40, True),
        (0, 2, 40, False),
    ):
        num_rows = num_tokens * num_slots
        row_of_slot = torch.randperm(num_rows).int().view(num_tokens, num_slots)
        weights = torch.rand(num_rows) if has_weights else None
        cases.append((torch.randn(num_rows, hidden).bfloat16(), row_of_slot, weights))
    return cases


def exact(case: Inputs) -> torch.Tensor:
    rows, row_of_slot, weights = case
    return gather_sum_reference(rows.double(), row_of_slot, weights)


def test_the_kernels_add_rows_up_and_number_them_under_the_interpreter(tmp_path: Path) -> None:
    given, found = tmp_path / "inputs.pt", tmp_path / "outputs.pt"
    chosen = torch.rand(40, 6).topk(3, dim=1).indices
    routing = torch.zeros(40, 6, dtype=torch.bool).scatter_(1, chosen, True), torch.rand(40, 6)
    sums = inputs()
    torch.save({"sums": sums, "routing": routing}, given)
    command = [sys.executable, "-m", "tests.harness.kernels.quack.interpreted", str(given), str(found)]
    subprocess.run(command, check=True, env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    outputs = torch.load(found)
    for case, total in zip(sums, outputs["sums"], strict=True):
        torch.testing.assert_close(total, exact(case).bfloat16(), rtol=1e-2, atol=1e-2)
    rows, probabilities = rows_of_routing_map(*routing, top_k=3)
    for mine, truth in zip(outputs["rows"], (*rows.tensors, probabilities), strict=True):
        assert torch.equal(mine, truth)


@pytest.mark.gpu("Triton compiles for GPUs; here its interpreter runs the kernels")
def test_the_compiled_kernel_adds_rows_up() -> None:
    for case in inputs():
        sums = gather_sum(*(None if tensor is None else tensor.cuda() for tensor in case))
        torch.testing.assert_close(sums.cpu(), exact(case).bfloat16(), rtol=1e-2, atol=1e-2)
