"""Experts divide over expert ranks and routing groups, and the router can do what the model asks."""

from __future__ import annotations

from collections.abc import Iterator

from moe_bench.spec.legality.rule import Found, nearest_divisor, rule
from moe_bench.spec.recipe import Recipe

_CONFIG = "megatron/core/transformer/transformer_config.py"
_ROUTING = "megatron/core/transformer/moe/moe_utils.py"


@rule(
    "expert ranks hold experts",
    f"{_CONFIG}:1469",
    "megatron/training/arguments.py:1601",
)
def experts_of_a_dense_model(recipe: Recipe) -> Iterator[Found]:
    if recipe.model.moe is None and recipe.parallel.expert > 1:
        yield "parallel.expert", f"EP{recipe.parallel.expert} on a model without experts", "write 1"


@rule(
    "every expert rank holds the same number of experts",
    "megatron/training/arguments.py:1602",
    "megatron/core/transformer/moe/moe_layer.py:185",
)
def experts_per_rank(recipe: Recipe) -> Iterator[Found]:
    moe, expert = recipe.model.moe, recipe.parallel.expert
    if moe is not None and moe.num_experts % expert:
        yield (
            "parallel.expert",
            f"EP{expert}, {moe.num_experts} experts",
            f"use {nearest_divisor(moe.common_num_experts, expert)}",
        )


@rule("a token cannot choose more experts than there are", f"{_ROUTING}:823")
def top_k(recipe: Recipe) -> Iterator[Found]:
    moe = recipe.model.moe
    if moe is not None and moe.top_k > moe.num_experts:
        yield "model.moe.top_k", f"{moe.top_k} of {moe.num_experts} experts", f"use {moe.num_experts}"


@rule(
    "group-limited routing chooses groups, and then experts of those groups alone",
    f"{_CONFIG}:2349",
    f"{_CONFIG}:2353",
    f"{_CONFIG}:2345",
    f"{_ROUTING}:655",
)
def routing_groups(recipe: Recipe) -> Iterator[Found]:
    moe = recipe.model.moe
    if moe is None:
        return
    groups, chosen = moe.router.num_groups, moe.router.groups_per_token
    key = "model.moe.router.num_groups"
    if (groups is None) != (chosen is None):
        yield key, f"num_groups {groups}, groups_per_token {chosen}", "state both or neither"
    elif groups is not None and chosen is not None:
        if moe.num_experts % groups:
            yield (
                key,
                f"{groups} groups over {moe.num_experts} experts",
                f"use {nearest_divisor(moe.num_experts, groups)}",
            )
        elif chosen > groups:
            yield "model.moe.router.groups_per_token", f"{chosen} of {groups} groups", f"use {groups}"
        elif not chosen <= moe.top_k <= chosen * (moe.num_experts // groups):
            yield (
                "model.moe.router.groups_per_token",
                f"{chosen} of {groups} groups with {moe.num_experts // groups} experts each, top-{moe.top_k}",
                "choose groups that hold top_k experts, and at most top_k groups",
            )


@rule("sigmoid scores of several experts are always renormalised", f"{_ROUTING}:868")
def sigmoid_renormalises(recipe: Recipe) -> Iterator[Found]:
    moe = recipe.model.moe
    if moe is None or moe.router.score_function != "sigmoid" or moe.router.renormalise or moe.top_k == 1:
        return
    if moe.router.choice != "top_k":
        return
    yield "model.moe.router.renormalise", "false with sigmoid", "write true"


@rule("softmax over one chosen expert is 1 and has no gradient", f"{_CONFIG}:2336")
def single_expert(recipe: Recipe) -> Iterator[Found]:
    moe = recipe.model.moe
    if moe is None or moe.top_k > 1 or moe.router.score_function != "softmax":
        return
    if moe.router.renormalise and moe.router.choice != "sinkhorn":
        yield "model.moe.router.renormalise", "true with softmax and top-1", "write false"


@rule("the bias of aux-loss-free balancing is added to sigmoid scores", f"{_CONFIG}:2288")
def expert_bias(recipe: Recipe) -> Iterator[Found]:
    moe = recipe.model.moe
    if moe is not None and moe.router.expert_bias and moe.router.score_function != "sigmoid":
        yield (
            "model.moe.router.expert_bias",
            f"true with {moe.router.score_function}",
            "write false, or score with sigmoid",
        )


@rule("a balancing loss needs a kind and a coefficient", "megatron/core/transformer/moe/router.py:385")
def aux_loss(recipe: Recipe) -> Iterator[Found]:
    moe = recipe.model.moe
    if moe is None:
        return
    router = moe.router
    if (router.aux_loss == "none") != (router.aux_loss_coefficient == 0):
        yield (
            "model.moe.router.aux_loss_coefficient",
            f"{router.aux_loss_coefficient} with aux_loss {router.aux_loss}",
            "write 0 and none, or state both",
        )


@rule(
    "expert biases are whole on every rank",
    f"{_CONFIG}:2280",
)
def bias_and_expert_tensor(recipe: Recipe) -> Iterator[Found]:
    if recipe.model.moe is not None and recipe.model.linear_bias and recipe.parallel.expert_tensor > 1:
        yield (
            "parallel.expert_tensor",
            f"ETP{recipe.parallel.expert_tensor} with biases in the experts",
            "write 1",
        )


@rule(
    "a loop over experts with biases writes into a view that autograd protects",
    "megatron/core/transformer/mlp.py:354",
)
def bias_and_expert_loop(recipe: Recipe) -> Iterator[Found]:
    if recipe.model.moe is not None and recipe.model.linear_bias and not recipe.kernels.grouped_gemm:
        yield "kernels.grouped_gemm", "false with biases in the experts", "write true"


@rule(
    "the fused bias and dropout does not know the experts' biases",
    "megatron/core/transformer/moe/experts.py:204",
)
def bias_and_dropout_fusion(recipe: Recipe) -> Iterator[Found]:
    if recipe.model.moe is not None and recipe.model.linear_bias and recipe.kernels.fusions.bias_dropout:
        yield "kernels.fusions.bias_dropout", "true with biases in the experts", "write false"


@rule("the gate scales the output of shared experts", "megatron/core/transformer/moe/moe_layer.py:334")
def shared_expert_gate(recipe: Recipe) -> Iterator[Found]:
    moe = recipe.model.moe
    if moe is not None and moe.shared_expert_gate and not moe.shared_expert_ffn_hidden_size:
        yield "model.moe.shared_expert_gate", "true without shared experts", "write false"


@rule("capacity is a limit of experts", f"{_CONFIG}:1688")
def capacity(recipe: Recipe) -> Iterator[Found]:
    if recipe.token_drop is not None and recipe.model.moe is None:
        yield "token_drop", "a capacity on a model without experts", "remove the block"


@rule(
    "probabilities can be applied before the expert only where there is one",
    "megatron/core/transformer/moe/experts.py:783",
    "megatron/core/transformer/moe/experts.py:1327",
)
def probs_on_input(recipe: Recipe) -> Iterator[Found]:
    moe = recipe.model.moe
    if moe is not None and recipe.dispatch.apply_probs_on_input and moe.top_k > 1:
        yield "dispatch.apply_probs_on_input", f"true with top-{moe.top_k}", "write false"


RULES = (
    experts_of_a_dense_model, experts_per_rank, top_k, routing_groups, sigmoid_renormalises, single_expert,
    expert_bias, aux_loss, bias_and_expert_tensor, bias_and_expert_loop, bias_and_dropout_fusion,
    shared_expert_gate, capacity, probs_on_input,
)  # fmt: skip
