"""Which token each row is, against Megatron-Core's permutations."""

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import permute, sort_chunks_by_idxs

from moe_bench.harness.kernels.quack.rows import rows_of_chunks, rows_of_routing_map

HOST = torch.device("cpu")


@pytest.mark.parametrize("top_k", [1, 3])
def test_rows_of_a_routing_map_are_those_that_megatron_permutes_to(top_k: int) -> None:
    chosen = torch.rand(12, 5).topk(top_k, dim=1).indices
    routing_map = torch.zeros(12, 5, dtype=torch.bool).scatter_(1, chosen, True)
    probabilities = torch.rand(12, 5)
    token = torch.arange(12).unsqueeze(1)
    permuted, weights, *_ = permute(token, routing_map, probs=probabilities, num_out_tokens=12 * top_k)
    rows, mine = rows_of_routing_map(routing_map, probabilities, top_k=top_k)
    assert rows.token_of_row.tolist() == permuted.flatten().tolist()
    assert torch.equal(mine, weights)
    assert rows.starts.diff().tolist() == routing_map.sum(dim=0).tolist()
    assert torch.equal(rows.token_of_row[rows.row_of_slot.long()], token.expand(12, top_k).int())


@pytest.mark.parametrize("counts", [[[2, 0, 3], [1, 4, 0]], [[5]], [[0, 0], [0, 0]], [[1], [2], [0], [3]]])
def test_rows_of_chunks_are_those_that_megatron_sorts_to(counts: list[list[int]]) -> None:
    matrix = torch.tensor(counts)
    num_rows, num_experts = int(matrix.sum()), matrix.shape[1]
    order = torch.arange(matrix.numel()).view(-1, num_experts).t().flatten()
    arrived = torch.arange(num_rows)
    wanted, _ = sort_chunks_by_idxs(arrived, matrix.flatten(), order)
    rows = rows_of_chunks(matrix, num_rows=num_rows, device=HOST)
    assert rows.token_of_row.tolist() == wanted.tolist()
    assert rows.token_of_row[rows.row_of_slot.long().flatten()].tolist() == arrived.tolist()
    assert rows.starts.tolist() == [0, *matrix.sum(dim=0).cumsum(0).tolist()]
