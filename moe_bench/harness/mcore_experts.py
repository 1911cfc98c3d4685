"""Megatron-Core's field names for expert layers, and what our own routers read beside them."""

from __future__ import annotations

from moe_bench.harness.mcore_fields import Arguments
from moe_bench.spec.legality.dispatch import FLEX
from moe_bench.spec.model import MixtureOfExperts
from moe_bench.spec.recipe import Recipe


def expert_arguments(recipe: Recipe) -> Arguments:
    """What Megatron-Core is told of experts, router, dispatcher and capacity; nothing of a dense model."""
    moe = recipe.model.moe
    if moe is None:
        return {}
    dispatch, drop = recipe.dispatch, recipe.token_drop
    is_flex = dispatch.dispatcher in FLEX
    return {
        "num_moe_experts": moe.num_experts,
        "moe_ffn_hidden_size": moe.expert_ffn_hidden_size,
        "moe_layer_freq": tuple(int(recipe.model.is_moe_layer(i)) for i in range(recipe.model.num_layers)),
        "moe_shared_expert_intermediate_size": moe.shared_expert_ffn_hidden_size or None,
        "moe_shared_expert_gate": moe.shared_expert_gate,
        **_router(moe),
        "moe_router_dtype": dispatch.router_dtype,
        "moe_router_force_load_balancing": recipe.routing.mode == "random_logits",
        "moe_router_force_biased": recipe.routing.bias_std if recipe.routing.mode == "biased" else None,
        "moe_token_dispatcher_type": "flex" if is_flex else dispatch.dispatcher,
        "moe_flex_dispatcher_backend": dispatch.dispatcher if is_flex else "deepep",
        "moe_flex_dispatcher_num_sms": dispatch.num_sms,
        "moe_apply_probs_on_input": dispatch.apply_probs_on_input,
        "high_priority_a2a_comm_stream": dispatch.high_priority_stream,
        "moe_expert_capacity_factor": None if drop is None else drop.capacity_factor,
        "moe_pad_expert_input_to_capacity": drop is not None and drop.pad_to_capacity,
        "moe_token_drop_policy": "probs" if drop is None else drop.policy,
    }


def _router(moe: MixtureOfExperts) -> Arguments:
    router = moe.router
    return {
        "moe_router_topk": moe.top_k,
        "moe_router_score_function": router.score_function,
        # softmax over the chosen experts renormalises; softmax over all of them, before top-k, does not
        "moe_router_pre_softmax": router.score_function == "softmax" and not router.renormalise,
        "moe_router_num_groups": router.num_groups,
        "moe_router_group_topk": router.groups_per_token,
        "moe_router_topk_scaling_factor": router.scaling_factor,
        "moe_router_enable_expert_bias": router.expert_bias,
        "moe_router_bias_update_rate": router.expert_bias_update_rate,
        "moe_router_load_balancing_type": "sinkhorn" if router.choice == "sinkhorn" else router.aux_loss,
        "moe_aux_loss_coeff": router.aux_loss_coefficient,
        "moe_z_loss_coeff": router.z_loss_coefficient or None,
    }


def own_router_arguments(recipe: Recipe) -> Arguments:
    """What Megatron-Core has no field for (harness/routers.py)."""
    moe, drop = recipe.model.moe, recipe.token_drop
    return {
        "router_choice": "top_k" if moe is None else moe.router.choice,
        "router_has_bias": moe is None or moe.router.has_bias,
        "shared_expert_mixing": "sum" if moe is None else moe.shared_expert_mixing,
        "eval_capacity_factor": None if drop is None else drop.eval_capacity_factor,
        "expert_steps": ()
        if moe is None
        else tuple((step.from_layer, step.num_experts, step.expert_ffn_hidden_size) for step in moe.steps),
        "min_capacity": 0 if drop is None else drop.min_capacity,
    }
