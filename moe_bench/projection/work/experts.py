"""The second half of a layer as operations: a dense MLP, or router, permutation and experts."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from moe_bench.analysis.activations import token_counts
from moe_bench.analysis.dispatch import dispatched_rows
from moe_bench.projection.work.attention import add_norm_and_residual
from moe_bench.projection.work.biases import (
    add_bias_rows,
    add_expert_biases,
    add_mixing,
    add_mlp_biases,
)
from moe_bench.projection.work.operations import Number, Part
from moe_bench.projection.work.tally import Modules, Tally
from moe_bench.spec.model import MixtureOfExperts
from moe_bench.spec.recipe import Precision

_MOE: Modules = frozenset({"moe"})
_SHARED: Modules = _MOE | {"shared_experts"}
_ACTIVATION: Modules = _MOE | {"moe_act"}
_DENSE: Modules = frozenset({"mlp"})
_BYTES = 2
"""Of a BF16 element."""
_SCORE_BYTES = 4
"""Of a routing score, FP32."""

_FUSED_SCORE_PASSES = 3
_UNFUSED_SCORE_PASSES = 8
"""Times that the scores of all experts are read or written between logits and routing map: one kernel with
`fusions.router`, otherwise scores, groups, top-k, mask, scatter and map (transformer/moe/moe_utils.py)."""

_UNFUSED_ACTIVATION = 3.0
"""Times the bytes of the fused kernel: the halves split, sigmoid, products and probabilities apart."""
_EPILOGUE_ACTIVATION = 0.5
"""Of the bytes, what is left where the activation stands in the epilogues of the products beside it."""
_UNFUSED_PERMUTATION = 2.0
"""Times the bytes of the fused kernel: index_select and masked_select build their index lists."""

_DENSE_LAUNCHES = 75
_ROUTER_LAUNCHES = 40
_PREPROCESS_LAUNCHES = 20
_DISPATCH_LAUNCHES = {True: 30, False: 60}
_EXPERT_BASE_LAUNCHES = 50
_SHARED_LAUNCHES = 25
_LAUNCHES_PER_EXPERT = 6
"""One GEMM per expert, projection and pass: two projections forward, dgrad and wgrad. On Hopper Transformer
Engine's GroupedLinear starts them one by one (te_general_grouped_gemm on several streams)."""
_QUANTIZATION_LAUNCHES_PER_EXPERT: Mapping[Precision, int] = MappingProxyType(
    {"fp8_tensorwise": 16, "fp8_blockwise": 4, "mxfp8": 4}
)
"""Of four tensors: the inputs of both projections and the gradients of their outputs. Current scaling clears
and finds the largest value, makes the scale of it, and casts; blocks are cast by one kernel. Delayed scaling
and NVFP4 cast all experts at once: nothing per expert (Transformer Engine 2.9 and 2.13, pytorch/csrc:
quantizer.cpp, Float8CurrentScalingQuantizer::quantize_impl; extensions/cast.cpp, split_quantize)."""

_CLAMP_FORWARD, _CLAMP_BACKWARD = 8, 10
"""Times that a half of the first projection's output is read or written where it is clamped: both halves
apart, put together, and their gradients (fusions/fused_bias_geglu.py, weighted_bias_quick_geglu_impl)."""


def add_dense_mlp(tally: Tally) -> None:
    """Pre-MLP norm, dense MLP and residual."""
    recipe = tally.recipe
    counts, hidden = token_counts(recipe), recipe.model.hidden_size
    add_norm_and_residual(tally, _BYTES * counts.sharded * hidden, is_last=True)
    width = (recipe.model.dense_ffn_hidden_size or 0) / recipe.parallel.tensor
    _add_mlp(tally, Part.DENSE_MLP, counts.gathered, hidden, width, repeated_by=(_DENSE, _DENSE))
    tally.launch(_DENSE_LAUNCHES, captured_by="mlp")


def add_experts(tally: Tally, moe: MixtureOfExperts, *, load: float) -> None:
    """Pre-MLP norm, router, permutation, routed and shared experts, residual.

    `load` is the number of tokens that the rank receives over the balanced number: 1 when balanced.
    """
    recipe = tally.recipe
    counts, model, parallel = token_counts(recipe), recipe.model, recipe.parallel
    add_norm_and_residual(tally, _BYTES * counts.sharded * model.hidden_size, is_last=True)
    _add_router(tally, moe)
    rows = load * dispatched_rows(recipe, moe) * parallel.expert_tensor
    num_local = max(1, moe.num_experts // parallel.expert)
    _add_permutation(tally, num_local, rows)
    width = moe.expert_ffn_hidden_size / parallel.expert_tensor
    hidden = model.expert_hidden_size
    _add_mlp(tally, Part.EXPERTS, rows, hidden, width, repeated_by=(_MOE, _ACTIVATION), num_groups=num_local)
    per_expert = _LAUNCHES_PER_EXPERT
    if tally.number is not Number.BF16:
        per_expert += _QUANTIZATION_LAUNCHES_PER_EXPERT.get(recipe.precision, 0)
    add_expert_biases(tally, rows, width, num_local=num_local)
    if recipe.kernels.family == "quack":
        per_expert = 0  # one kernel for all of them
    tally.launch(_EXPERT_BASE_LAUNCHES + per_expert * num_local, captured_by="moe")
    if moe.latent_size is not None:
        for inner, columns in ((model.hidden_size, hidden), (hidden, model.hidden_size)):
            tally.gemm(Part.LATENT, counts.sharded, inner, columns, repeated_by=_MOE)
    if moe.shared_expert_ffn_hidden_size:
        shared = moe.shared_expert_ffn_hidden_size / parallel.tensor
        repeated_by = (_SHARED, _SHARED)
        _add_mlp(
            tally, Part.SHARED_EXPERTS, counts.gathered, model.hidden_size, shared, repeated_by=repeated_by
        )
        tally.launch(_SHARED_LAUNCHES, captured_by="moe_router")
        if moe.shared_expert_mixing == "softmax":
            add_mixing(tally, moe.num_experts)


def _add_mlp(
    tally: Tally,
    part: Part,
    rows: float,
    hidden: int,
    width: float,
    *,
    repeated_by: tuple[Modules, Modules],
    num_groups: int = 1,
) -> None:
    """Two projections and the activation between them: `rows` over all groups, `width` per rank;
    `repeated_by` has the recompute modules of the projections and of the activation.
    """
    recipe = tally.recipe
    projections, between = repeated_by
    halves = 1 + recipe.model.activation.is_gated
    each = rows / num_groups
    tally.gemm(part, each, hidden, halves * width, num_groups=num_groups, repeated_by=projections)
    if part is Part.EXPERTS:
        add_bias_rows(tally, rows, halves * width, num_local=num_groups)
    else:
        add_mlp_biases(tally, part, halves * width, repeated_by=between)
    unfused = 1.0 if recipe.kernels.fusions.activation else _UNFUSED_ACTIVATION
    if part is Part.EXPERTS and (tally.fuses_epilogues or recipe.kernels.family == "quack"):
        unfused = _EPILOGUE_ACTIVATION
    moved = _BYTES * rows * width * unfused
    # forward the halves are read and their product written; backward both and the gradient, and both written
    tally.move(
        part,
        forward_bytes=(halves + 1) * moved,
        backward_bytes=(2 * halves + 1) * moved,
        repeated_by=between,
    )
    if recipe.model.activation.clamp_limit is not None and not recipe.kernels.op_fuser:
        clamped = _BYTES * rows * width
        tally.move(
            part,
            forward_bytes=_CLAMP_FORWARD * clamped,
            backward_bytes=_CLAMP_BACKWARD * clamped,
            repeated_by=between,
        )
    tally.gemm(part, each, width, hidden, num_groups=num_groups, repeated_by=projections, is_last=True)
    if part is Part.EXPERTS:
        add_bias_rows(tally, rows, hidden, num_local=num_groups)


def _add_router(tally: Tally, moe: MixtureOfExperts) -> None:
    recipe = tally.recipe
    rows = token_counts(recipe).sharded
    tally.gemm(
        Part.ROUTER,
        rows,
        recipe.model.hidden_size,
        moe.num_experts,
        number=Number.BF16,
        repeated_by=_MOE,
    )
    passes = _FUSED_SCORE_PASSES if recipe.kernels.fusions.router else _UNFUSED_SCORE_PASSES
    scores = passes * _SCORE_BYTES * rows * moe.num_experts
    tally.move(Part.ROUTER, forward_bytes=scores, backward_bytes=scores, repeated_by=_MOE)
    tally.launch(_ROUTER_LAUNCHES, captured_by="moe_router")


def _add_permutation(tally: Tally, num_local: int, rows: float) -> None:
    """Tokens copied into rows and back, t H a and r H a each way; no gradient asks for the way back.

    With `alltoall` a rank orders its tokens by expert before they leave and, where it has several experts, by
    local expert when they arrive; DeepEP and HybridEP send unordered tokens and order them on arrival.
    quack's experts read rows where they arrived, and add each token's up: r H and as many outputs, each way.
    """
    recipe = tally.recipe
    hidden = recipe.model.expert_hidden_size
    tokens, copies = (_BYTES * count * hidden for count in (token_counts(recipe).sharded, rows))
    moved = 2 * (tokens + copies)
    is_flex = recipe.dispatch.dispatcher not in ("alltoall", "allgather")
    gathers = recipe.kernels.family == "quack" and recipe.dispatch.dispatcher == "alltoall"
    if is_flex:
        moved = 4 * copies
    elif gathers and recipe.parallel.expert == 1:
        moved = 0
    elif recipe.parallel.expert > 1 and num_local > 1 and not gathers:
        moved += 4 * copies
    if recipe.kernels.op_fuser:
        moved *= 0.5  # the fused grouped MLP reads permuted rows as it gathers them
    elif not recipe.kernels.fusions.permute:
        moved *= _UNFUSED_PERMUTATION
    if gathers:
        moved += copies + (tokens if recipe.parallel.expert == 1 else copies)
    for is_last in (False, True):
        tally.move(
            Part.PERMUTATION,
            forward_bytes=moved / 2,
            backward_bytes=moved / 2,
            repeated_by=_MOE,
            is_last=is_last,
        )
    tally.launch(_PREPROCESS_LAUNCHES, captured_by="moe_preprocess")
    tally.launch(_DISPATCH_LAUNCHES[is_flex], captured_by="moe")
