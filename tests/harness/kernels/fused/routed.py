"""Routing maps for the tests of permutations."""

import torch
from torch import Tensor


def routing_map(num_tokens: int, num_experts: int, top_k: int, *, device: str) -> Tensor:
    """Random choices, one token that nobody takes, and one expert that nobody chooses."""
    chosen = torch.rand(num_tokens, num_experts - 1).argsort(dim=1)[:, :top_k]
    entries = torch.zeros(num_tokens, num_experts, dtype=torch.bool).scatter(1, chosen, True)
    entries[num_tokens // 2] = False
    return entries.to(device)
