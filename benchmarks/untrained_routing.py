"""How many tokens the busiest expert and expert-parallel rank receive from a router that has learned nothing.

    python benchmarks/untrained_routing.py TEXT            # a text file; 2,048 of its words are read

Builds Qwen3-30B-A3B layer by layer with Megatron-Core's initial weights (normal, 0.02, products that write to
the residual 0.02 / sqrt(2 L)) and passes the words through it, each a vector of its own. Eight minutes of two
cores. projection/rows/untrained.py rests on what it prints.
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

HIDDEN, LAYERS, EXPERTS, TOP_K, FFN = 2048, 48, 128, 8, 768
HEADS, GROUPS, HEAD_DIM, ROPE_BASE = 32, 4, 128, 1e6
RANKS, STD = 8, 0.02


def main() -> None:
    """Read the words and print a line per layer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("--num-tokens", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    words = re.findall(r"\w+|[^\w\s]", arguments.text.read_text(encoding="utf-8"))
    # the middle of a book is prose
    first = max(0, len(words) // 2 - arguments.num_tokens)
    words = words[first : first + arguments.num_tokens]
    weights = Weights(arguments.seed)
    vectors = {word: weights.of(HIDDEN) for word in dict.fromkeys(words)}
    hidden = torch.stack([vectors[word] for word in words])
    print("layer  busiest expert  busiest rank of 8  (over the mean)")
    for layer in range(LAYERS):
        hidden = hidden + attention(normed(hidden), weights)
        output, counts = experts(normed(hidden), weights)
        hidden = hidden + output
        by_rank = counts.view(RANKS, -1).sum(1)
        busiest = counts.max() / counts.mean(), by_rank.max() / by_rank.mean()
        print(f"{layer:5}  {busiest[0]:14.1f}  {busiest[1]:17.2f}", flush=True)


class Weights:
    """Random weights, made where they are used."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def of(self, *shape: int, std: float = STD) -> Tensor:
        """A tensor of N(0, std)."""
        return torch.randn(*shape, generator=self._generator) * std

    def last(self, *shape: int) -> Tensor:
        """A product's that writes to the residual."""
        return self.of(*shape, std=STD / math.sqrt(2 * LAYERS))


def normed(values: Tensor) -> Tensor:
    """RMSNorm with weights of 1."""
    return values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + 1e-6)


def attention(hidden: Tensor, weights: Weights) -> Tensor:
    """Causal grouped-query attention with normed, rotated heads."""
    query, key, value = (
        (hidden @ weights.of(HIDDEN, heads * HEAD_DIM)).view(-1, heads, HEAD_DIM).transpose(0, 1)
        for heads in (HEADS, GROUPS, GROUPS)
    )
    key, value = (each.repeat_interleave(HEADS // GROUPS, 0) for each in (rotated(normed(key)), value))
    mixed = functional.scaled_dot_product_attention(rotated(normed(query)), key, value, is_causal=True)
    return mixed.transpose(0, 1).reshape(-1, HEADS * HEAD_DIM) @ weights.last(HEADS * HEAD_DIM, HIDDEN)


def rotated(heads: Tensor) -> Tensor:
    """Rotary embedding of [heads, tokens, width]."""
    frequencies = ROPE_BASE ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.arange(heads.shape[1])[:, None] * frequencies
    first, second = heads.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def experts(hidden: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """Output of the chosen experts, and tokens per expert."""
    scores, chosen = torch.softmax(hidden @ weights.of(HIDDEN, EXPERTS), -1).topk(TOP_K)
    scores = scores / scores.sum(-1, keepdim=True)
    output = torch.zeros_like(hidden)
    for expert in range(EXPERTS):
        gate, up = weights.of(HIDDEN, FFN), weights.of(HIDDEN, FFN)
        down = weights.last(FFN, HIDDEN)
        tokens, place = (chosen == expert).nonzero(as_tuple=True)
        rows = hidden[tokens]
        rows = (functional.silu(rows @ gate) * (rows @ up)) @ down
        output.index_add_(0, tokens, rows * scores[tokens, place][:, None])
    return output, torch.bincount(chosen.flatten(), minlength=EXPERTS).float()


if __name__ == "__main__":
    main()
