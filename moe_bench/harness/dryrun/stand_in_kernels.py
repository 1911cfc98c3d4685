"""Functions that allocate and keep for the backward pass what a fused GPU kernel does, and compute nothing.

`moe_bench.harness.dryrun.stand_ins` lists them with the kernel that each stands for and where that was read.
`on_flops` is called where a kernel multiplies matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_bench.harness.dryrun.operator_flops import FlopKind

OnFlops = Callable[[FlopKind, int], None]
Gradients = tuple[Tensor | None, ...]


def visible_pairs(*, num_queries: int, num_keys: int, window_tokens: int | None) -> int:
    """Pairs of query and key that a causal mask leaves, for the queries that one rank holds.

    S^2 / 2 over a whole sequence, as Megatron-Core counts (the half without its diagonal); with a window of
    W < S tokens S W - W (W - 1) / 2. Under context parallelism a rank holds num_queries of the num_keys
    tokens, early and late ones in equal parts, and so that share of the pairs.
    """
    if window_tokens is None or window_tokens >= num_keys:
        return num_queries * num_keys // 2
    whole = num_keys * window_tokens - window_tokens * (window_tokens - 1) // 2
    return whole * num_queries // num_keys


class Attention(torch.autograd.Function):
    """Fused attention on [b, heads, s, channels]; keeps its inputs, its output and the log-sum-exp.

    2 b n pairs (d_k + d_v) operations forward, 2 b n pairs (3 d_k + 2 d_v) backward: the scores again, and
    the gradients of scores, values, queries and keys.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, window_tokens: int | None, on_flops: OnFlops
    ) -> Tensor:
        batch, heads, num_queries, k_channels = query.shape
        output = query.new_empty(batch, num_queries, heads, value.shape[-1]).transpose(1, 2)
        log_sum_exp = query.new_empty(batch, heads, num_queries, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sum_exp)
        pairs = visible_pairs(num_queries=num_queries, num_keys=key.shape[2], window_tokens=window_tokens)
        ctx.per_channel_flops = 2 * batch * heads * pairs
        ctx.on_flops = on_flops
        on_flops(FlopKind.ATTENTION, ctx.per_channel_flops * (k_channels + value.shape[-1]))
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        query, key, value, _, _ = ctx.saved_tensors
        channels = 3 * query.shape[-1] + 2 * value.shape[-1]
        ctx.on_flops(FlopKind.ATTENTION, ctx.per_channel_flops * channels)
        grad_query = torch.empty_like(query)
        # The kernels write gradients of keys and values per query head, then add them up by group.
        per_head = [
            tensor.new_empty(*query.shape[:2], *tensor.shape[2:])
            for tensor in (key, value)
            if key.shape[1] != query.shape[1]
        ]
        grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
        del per_head
        return grad_query, grad_key, grad_value, None, None


class Sink(torch.autograd.Function):
    """Attention's output [b, heads, s, channels] scaled for a sink; keeps what it was before."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, sink: Tensor) -> Tensor:
        ctx.save_for_backward(output, sink)
        return torch.empty_like(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        output, sink = ctx.saved_tensors
        return torch.empty_like(output), torch.empty_like(sink)


class RMSNorm(torch.autograd.Function):
    """Keeps its input, its weight and 1 / rms per row in FP32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class Rope(torch.autograd.Function):
    """Rotated copy of a tensor; keeps the angles, which all layers share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Tensor) -> Tensor:
        ctx.save_for_backward(angles)
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        return torch.empty_like(grad, memory_format=torch.contiguous_format), None


class CrossEntropy(torch.autograd.Function):
    """Loss over a divided vocabulary: keeps a copy of the logits, which becomes their gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, tp_group: Any) -> Tensor:
        first, second, vocab = logits.shape
        rows = first * second
        kept = logits.new_empty(first, second, vocab)
        ctx.save_for_backward(kept, logits.new_empty(rows, 2, dtype=torch.float32), labels)
        if tp_group.size() > 1:
            local = logits.new_empty(rows, 4, dtype=torch.float32)
            gathered = logits.new_empty(rows * tp_group.size(), 4, dtype=torch.float32)
            torch.distributed.all_gather_into_tensor(gathered, local, group=tp_group)
        return logits.new_empty(first, second, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        return ctx.saved_tensors[0], None, None


class NoKernel:
    """A Triton kernel that writes nothing: what is around it allocates and keeps."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        """The launch over a grid."""
        return _launch_nothing


def _launch_nothing(*args: object, **kwargs: object) -> None:
    del args, kwargs


def one_sinkhorn_round(cost: Tensor, tol: float = 0.0) -> Tensor:
    """The first round of Megatron-Core's `sinkhorn`, [tokens, experts]; the others need values."""
    scores = torch.exp(cost)
    rows = 1 / torch.sum(scores, 1)
    columns = 1 / torch.sum(rows.unsqueeze(1) * scores, 0)
    return columns * scores * rows.unsqueeze(1)
