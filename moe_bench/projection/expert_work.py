"""The second half of a layer as operations: a dense MLP, or router, permutation and experts."""

from __future__ import annotations

from moe_bench.analysis.activations import token_counts
from moe_bench.analysis.dispatch import dispatched_rows
from moe_bench.projection.attention_work import add_norm_and_residual
from moe_bench.projection.operations import Number, Part
from moe_bench.projection.tally import Modules, Tally
from moe_bench.spec.model import MixtureOfExperts

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
_UNFUSED_PERMUTATION = 2.0
"""Times the bytes of the fused kernel: index_select and masked_select build their index lists."""

_DENSE_LAUNCHES = 75
_ROUTER_LAUNCHES = 40
_PREPROCESS_LAUNCHES = 20
_DISPATCH_LAUNCHES = 60
_EXPERT_BASE_LAUNCHES = 50
_SHARED_LAUNCHES = 25
_LAUNCHES_PER_EXPERT = 6
"""One GEMM per expert, projection and pass: two projections forward, dgrad and wgrad. On Hopper Transformer
Engine's GroupedLinear starts them one by one (te_general_grouped_gemm on several streams)."""
_QUANTIZED_LAUNCHES_PER_EXPERT = 12
"""The same and their quantization, expert by expert."""


def add_dense_mlp(tally: Tally) -> None:
    """Pre-MLP norm, dense MLP and residual."""
    recipe = tally.recipe
    counts, hidden = token_counts(recipe), recipe.model.hidden_size
    add_norm_and_residual(tally, _BYTES * counts.sharded * hidden)
    width = (recipe.model.dense_ffn_hidden_size or 0) / recipe.parallel.tensor
    _add_mlp(tally, Part.DENSE_MLP, counts.gathered, hidden, width, _DENSE, _DENSE)
    tally.launch(_DENSE_LAUNCHES, captured_by="mlp")


def add_experts(tally: Tally, moe: MixtureOfExperts, *, load: float) -> None:
    """Pre-MLP norm, router, permutation, routed and shared experts, residual.

    `load` is the number of tokens that the rank receives over the balanced number: 1 when balanced.
    """
    recipe = tally.recipe
    counts, hidden, parallel = token_counts(recipe), recipe.model.hidden_size, recipe.parallel
    add_norm_and_residual(tally, _BYTES * counts.sharded * hidden)
    _add_router(tally, moe)
    rows = load * dispatched_rows(recipe, moe) * parallel.expert_tensor
    num_local = max(1, moe.num_experts // parallel.expert)
    _add_permutation(tally, moe, rows)
    width = moe.expert_ffn_hidden_size / parallel.expert_tensor
    _add_mlp(tally, Part.EXPERTS, rows, hidden, width, _MOE, _ACTIVATION, num_groups=num_local)
    if recipe.model.linear_bias:
        biased = _BYTES * rows * (2 * width + hidden)
        tally.move(Part.EXPERTS, forward_bytes=2 * biased, backward_bytes=biased, repeated_by=_MOE)
    per_expert = _LAUNCHES_PER_EXPERT if tally.number is Number.BF16 else _QUANTIZED_LAUNCHES_PER_EXPERT
    tally.launch(_EXPERT_BASE_LAUNCHES + per_expert * num_local, captured_by="moe")
    if moe.shared_expert_ffn_hidden_size:
        shared = moe.shared_expert_ffn_hidden_size / parallel.tensor
        _add_mlp(tally, Part.SHARED_EXPERTS, counts.gathered, hidden, shared, _SHARED, _SHARED)
        tally.launch(_SHARED_LAUNCHES, captured_by="moe_router")


def _add_mlp(
    tally: Tally,
    part: Part,
    rows: float,
    hidden: int,
    width: float,
    repeated_by: Modules,
    activation_repeated_by: Modules,
    *,
    num_groups: int = 1,
) -> None:
    """Two projections and the gated activation between them, `rows` over all groups, `width` per rank."""
    tally.gemm(part, rows / num_groups, hidden, 2 * width, num_groups=num_groups, repeated_by=repeated_by)
    unfused = 1.0 if tally.recipe.kernels.fusions.activation else _UNFUSED_ACTIVATION
    halves = _BYTES * rows * width * unfused
    tally.move(part, forward_bytes=3 * halves, backward_bytes=5 * halves, repeated_by=activation_repeated_by)
    tally.gemm(part, rows / num_groups, width, hidden, num_groups=num_groups, repeated_by=repeated_by)


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


def _add_permutation(tally: Tally, moe: MixtureOfExperts, rows: float) -> None:
    """Copies of rows, each read and written once, r H a: with `alltoall` a rank orders its tokens by expert
    before they leave, by local expert when they arrive, and back twice; DeepEP and HybridEP send unordered
    tokens and order them on arrival.
    """
    recipe = tally.recipe
    copied = 2 * _BYTES * rows * recipe.model.hidden_size
    is_flex = recipe.dispatch.dispatcher not in ("alltoall", "allgather")
    fused = 1.0 if recipe.kernels.fusions.permute else _UNFUSED_PERMUTATION
    if recipe.kernels.op_fuser:
        fused *= 0.5  # the fused grouped MLP reads permuted rows as it gathers them
    num_copies = 2 if is_flex or recipe.parallel.expert == 1 else 4
    tally.move(
        Part.PERMUTATION,
        forward_bytes=num_copies * copied * fused,
        backward_bytes=num_copies * copied * fused,
        repeated_by=_MOE,
    )
    tally.launch(_PREPROCESS_LAUNCHES, captured_by="moe_preprocess")
    tally.launch(_DISPATCH_LAUNCHES, captured_by="moe")
