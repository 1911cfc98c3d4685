"""Biases of MLPs and experts, and the weighing of residual experts, as operations."""

from __future__ import annotations

from moe_bench.analysis.activations import token_counts
from moe_bench.projection.work.operations import Number, Part
from moe_bench.projection.work.tally import NO_MODULES, Modules, Tally

_MOE: Modules = frozenset({"moe"})
_BYTES = 2
"""Of a BF16 element."""
_SCORE_BYTES = 4
"""Of a routing score, FP32."""

_LAUNCHES_PER_EXPERT = 8
"""Product and sum of the bias forward, and their gradients, expert by expert (experts.py, _apply_bias)."""
_PRODUCT_LAUNCHES = 24
"""The same of all experts at once: 4 for the matrix that says whose a row is, 1 and 2 for the first
projection's bias, 5 and 12 for the second's, weighted and added in FP32 (harness/kernels/experts.py)."""
_MLP_LAUNCHES = 4
"""Two sums forward, two over rows backward."""
_MIXING_LAUNCHES = 34
"""Logits made twice (product, softmax, cast) and what each weighs, forward and backward."""

_FORWARD_BYTES, _BACKWARD_BYTES = 28, 36
"""Per element of the experts' output: b p in FP32 (written), its sum with y (read, written), all experts put
together and cast to BF16; backward the cast, and the products with p and b, each with its sum (experts.py,
_apply_bias)."""
_PRODUCT_FORWARD_BYTES, _PRODUCT_BACKWARD_BYTES = 22, 40
"""The same beside the product that makes bias rows: rows times p to FP32 (6), their sum with y (10), cast
(6); backward the cast (6), y's gradient (6), that of the rows (8, cast 6) and of p (10, summed 4)."""


def adds_expert_biases(tally: Tally) -> bool:
    """Whether the experts have biases that are added by kernels of their own."""
    recipe = tally.recipe
    return recipe.model.linear_bias and not recipe.kernels.op_fuser and not tally.fuses_expert_biases


def add_bias_rows(tally: Tally, rows: float, columns: float, *, num_local: int) -> None:
    """The product of rows' experts, one-hot, with the experts' biases, and its transpose for the biases'
    gradient, where the torch-native kernels add them so; nothing elsewhere.
    """
    if adds_expert_biases(tally) and tally.recipe.kernels.is_torch_native:
        tally.select(Part.EXPERTS, rows, num_local, columns, repeated_by=_MOE)


def add_expert_biases(tally: Tally, rows: float, width: float, *, num_local: int) -> None:
    """The second projection's bias, b p + y, and the gradient of the first one's, `width` channels per half,
    beside the products of `add_bias_rows`: expert by expert around Transformer Engine's.
    """
    if not adds_expert_biases(tally):
        return
    model = tally.recipe.model
    outputs = rows * model.expert_hidden_size
    first = _BYTES * rows * (1 + model.activation.is_gated) * width
    if tally.recipe.kernels.is_torch_native:
        # the first product adds to y, which is read; the one-hot matrix is written once
        forward = _PRODUCT_FORWARD_BYTES * outputs + first + _BYTES * rows * num_local
        backward = _PRODUCT_BACKWARD_BYTES * outputs
        num_launches = _PRODUCT_LAUNCHES
    else:
        forward = _FORWARD_BYTES * outputs
        backward = _BACKWARD_BYTES * outputs + first
        num_launches = _LAUNCHES_PER_EXPERT * num_local
    tally.move(Part.EXPERTS, forward_bytes=forward, backward_bytes=backward, repeated_by=_MOE, is_last=True)
    tally.launch(num_launches, captured_by="moe")


def add_mlp_biases(tally: Tally, part: Part, width: float, *, repeated_by: Modules) -> None:
    """Both biases of a dense or shared MLP, whose products give them back unadded (transformer/mlp.py,
    skip_bias_add): `width` channels per rank into the activation, which adds the first where it is fused. The
    second joins the residual's sum where `fusions.bias_dropout` says so and the MLP stands alone. A bias's
    gradient sums that of its rows, which is read.
    """
    recipe = tally.recipe
    if not recipe.model.linear_bias:
        return
    counts, fusions = token_counts(recipe), recipe.kernels.fusions
    first = _BYTES * counts.gathered * width
    second = _BYTES * counts.sharded * recipe.model.hidden_size
    is_dense = part is Part.DENSE_MLP
    tally.move(
        part,
        forward_bytes=0 if fusions.activation else 2 * first,
        backward_bytes=first,
        repeated_by=repeated_by,
    )
    tally.move(
        part,
        forward_bytes=0 if is_dense and fusions.bias_dropout else 2 * second,
        backward_bytes=second,
        repeated_by=NO_MODULES if is_dense else repeated_by,
        is_last=is_dense,
    )
    tally.launch(_MLP_LAUNCHES, captured_by="mlp" if is_dense else "moe_router")


def add_mixing(tally: Tally, num_experts: int) -> None:
    """w = softmax(x A + b) over two, made for the routed experts' probabilities and again for the shared
    experts' output, which they weigh (harness/kernels/shared_experts.py).
    """
    recipe = tally.recipe
    tokens, hidden = token_counts(recipe).sharded, recipe.model.hidden_size
    for _ in range(2):
        tally.gemm(Part.SHARED_EXPERTS, tokens, hidden, 2, number=Number.BF16, repeated_by=_MOE)
    # a product reads and writes; backward it does so again, and for w reads both factors and sums
    scores, outputs = _SCORE_BYTES * tokens * num_experts, _BYTES * tokens * hidden
    moved = 2 * (scores + outputs)
    tally.move(Part.SHARED_EXPERTS, forward_bytes=moved, backward_bytes=3 * moved, repeated_by=_MOE)
    tally.launch(_MIXING_LAUNCHES, captured_by="moe_router")
