"""Operations that move tensors and compute little, as calls to be timed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.calibrate.inputs import DTYPES, FreshBackward, backward_call, normal
from moe_bench.harness.timing import Call
from moe_bench.results.calibration import Dtype, MemoryBound
from moe_bench.results.calibration_tasks import (
    DEVICE_TO_DEVICE,
    HOST_TO_DEVICE,
    Implementation,
    PermutationVariant,
    RouterVariant,
)

_NUM_CHUNKS = 8
"""Groups of rows that arrive together, from as many ranks; how many there are does not change the bytes."""


def memory_call(what: MemoryBound, dtype: Dtype, implementation: Implementation, device: str) -> Call:
    """One of them; MissingRequirementError where this machine has not what it needs."""
    if what.operation == "copy":
        return _copy_call(what, device)
    if what.operation == "optimizer_step":
        return _optimizer_call(what.shape[0], implementation, device)
    if implementation is Implementation.ADD:
        first, second, out = (normal(*what.shape, dtype=DTYPES[dtype], device=device) for _ in range(3))
        return lambda: torch.add(first, second, out=out)
    # scores of the router are FP32, whatever the dtype of the tokens
    kind = torch.float32 if what.operation == "router" else DTYPES[dtype]
    x = normal(*what.shape, dtype=kind, device=device).requires_grad_(what.direction == "backward")
    function, weights = _function(what, kind, implementation, device)
    if what.direction == "forward":
        return torch.no_grad()(lambda: function(x))
    if implementation.package is not None:
        return FreshBackward(lambda: function(x), [x, *weights])
    return backward_call(function(x), [x, *weights])


def _function(
    what: MemoryBound, kind: torch.dtype, implementation: Implementation, device: str
) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """What is computed from the main input, and the weights whose gradients belong to it."""
    width = what.shape[-1]
    if implementation is Implementation.RMS_NORM:
        weight = torch.ones(width, dtype=kind, device=device).requires_grad_()
        return lambda x: functional.rms_norm(x, (width,), weight, 1e-6), [weight]
    if implementation is Implementation.TE_RMS_NORM:
        import transformer_engine.pytorch as te

        norm = te.RMSNorm(width, params_dtype=kind, device=device)
        return norm, list(norm.parameters())
    if what.operation == "router":
        variant = RouterVariant.parse(what.variant)
        return lambda scores: routed(scores, variant), []
    permutation = PermutationVariant.parse(what.variant)
    if implementation is Implementation.TE_PERMUTE:
        return _te_permutation(permutation, num_tokens=what.shape[0], device=device), []
    return _permutation(permutation, num_tokens=what.shape[0], device=device), []


def routed(scores: Tensor, variant: RouterVariant) -> Tensor:
    """Probabilities [tokens, experts], zero but for the chosen experts, from scores [tokens, experts].

    Step by step, as Megatron-Core without a fused router (transformer/moe/moe_utils.py).
    """
    weights = scores.softmax(-1) if variant.score == "softmax" else scores.sigmoid()
    chosen_from = weights
    if variant.num_groups is not None and variant.group_top_k is not None:
        grouped = weights.unflatten(-1, (variant.num_groups, -1))
        per_group = max(1, variant.top_k // variant.group_top_k)
        best = grouped.topk(per_group, dim=-1).values.sum(-1).topk(variant.group_top_k, dim=-1).indices
        mask = torch.zeros_like(grouped[..., 0]).scatter_(1, best, 1.0).bool()
        chosen_from = grouped.masked_fill(~mask.unsqueeze(-1), float("-inf")).flatten(-2)
    chosen = chosen_from.topk(variant.top_k, dim=-1).indices
    values = weights.gather(1, chosen)
    values = values / (values.sum(-1, keepdim=True) + 1e-20)
    return torch.zeros_like(weights).scatter(1, chosen, values)


def _permutation(variant: PermutationVariant, *, num_tokens: int, device: str) -> Callable[[Tensor], Tensor]:
    """Copies of tokens in the order of experts and back, by index."""
    num_rows = num_tokens * variant.top_k
    order = torch.randperm(num_rows, device=device)
    again = torch.randperm(num_rows, device=device)
    inverse = again.argsort()
    token = order // variant.top_k

    def there_and_back(x: Tensor) -> Tensor:
        rows = x.index_select(0, token)
        if variant.is_sorted_again:
            rows = rows.index_select(0, again).index_select(0, inverse)
        return torch.zeros_like(x).index_add(0, token, rows)

    return there_and_back


def _te_permutation(
    variant: PermutationVariant, *, num_tokens: int, device: str
) -> Callable[[Tensor], Tensor]:
    """The same with Transformer Engine's kernels, from a map of tokens to experts."""
    import transformer_engine.pytorch as te

    num_experts, num_rows = _NUM_CHUNKS * variant.top_k, num_tokens * variant.top_k
    chosen = torch.rand(num_tokens, num_experts, device=device).topk(variant.top_k, dim=-1).indices
    routing_map = torch.zeros(num_tokens, num_experts, dtype=torch.int32, device=device)
    routing_map.scatter_(1, chosen, 1)
    sizes = torch.full((_NUM_CHUNKS,), num_rows // _NUM_CHUNKS, device=device)
    sizes[-1] += num_rows % _NUM_CHUNKS
    order = torch.arange(_NUM_CHUNKS - 1, -1, -1, device=device)

    def there_and_back(x: Tensor) -> Tensor:
        rows, row_ids = te.moe_permute(x, routing_map, num_rows, map_type="mask")
        if variant.is_sorted_again:
            rows = te.moe_sort_chunks_by_index(rows, sizes, order)
            rows = te.moe_sort_chunks_by_index(rows, sizes.flip(0), order)
        back: Tensor = te.moe_unpermute(rows, row_ids, restore_shape=x.shape, map_type="mask")
        return back

    return there_and_back


def _copy_call(what: MemoryBound, device: str) -> Call:
    num_bytes = what.shape[0]
    if what.variant == DEVICE_TO_DEVICE:
        source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
    elif device == "cpu":
        raise MissingRequirementError("copies between host and device need a GPU")
    else:
        host = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8).pin_memory()
        there = host.to(device)
        source, target = (host, there) if what.variant == HOST_TO_DEVICE else (there, host)
    return lambda: target.copy_(source, non_blocking=True)


def _optimizer_call(num_params: int, implementation: Implementation, device: str) -> Call:
    """One step of Adam over one tensor, gradients and all."""
    if implementation is Implementation.STORED_ADAM:
        from moe_bench.harness.kernels.adam import StoredBf16Adam

        small = torch.nn.Parameter(normal(num_params, dtype=torch.bfloat16, device=device))
        small.decoupled_grad = normal(num_params, dtype=torch.float32, device=device)
        half = torch.bfloat16
        stored = StoredBf16Adam([small], lr=1e-4, exp_avg_dtype=half, exp_avg_sq_dtype=half)
        return stored.step
    param = torch.nn.Parameter(normal(num_params, dtype=torch.float32, device=device))
    param.grad = normal(num_params, dtype=torch.float32, device=device)
    if implementation is Implementation.TE_ADAM:
        from transformer_engine.pytorch.optimizers import FusedAdam

        step: Call = FusedAdam([param], lr=1e-4).step
        return step
    adam: Call = torch.optim.AdamW([param], lr=1e-4, fused=True).step
    return adam
