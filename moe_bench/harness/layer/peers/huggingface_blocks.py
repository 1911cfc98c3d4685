"""Hugging Face transformers' MoE blocks: what each computes, its configuration, and where its weights are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.layer.peers import obstacles
from moe_bench.harness.layer.peers.modules import GPT_OSS_ALPHA, gradient_of
from moe_bench.harness.layer.weights import LayerWeights
from moe_bench.spec.layer_case import LayerCase


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One MoE block of transformers: where it is, what it takes, and how weights fit into it."""

    model: str
    """Folder under transformers/models."""
    config_class: str
    block_class: str
    cannot: Callable[[LayerCase], str | None]
    config: Callable[[LayerCase], dict[str, Any]]
    place: Callable[[Any, LayerWeights], None]
    """Gives the block's modules their parameters."""
    gradients: Callable[[Any], LayerWeights]


def _sizes(case: LayerCase) -> dict[str, Any]:
    moe = case.moe
    return {"hidden_size": case.hidden_size, "num_experts_per_tok": moe.top_k}


def _mixtral_config(case: LayerCase) -> dict[str, Any]:
    moe = case.moe
    return _sizes(case) | {
        "num_local_experts": moe.num_experts,
        "intermediate_size": moe.expert_ffn_hidden_size,
    }


def _qwen3_config(case: LayerCase) -> dict[str, Any]:
    moe = case.moe
    return _sizes(case) | {
        "num_experts": moe.num_experts,
        "moe_intermediate_size": moe.expert_ffn_hidden_size,
        "norm_topk_prob": moe.router.renormalise,
    }


def _deepseek_config(case: LayerCase) -> dict[str, Any]:
    moe = case.moe
    return _sizes(case) | {
        "n_routed_experts": moe.num_experts,
        "moe_intermediate_size": moe.expert_ffn_hidden_size,
        "n_shared_experts": moe.shared_expert_ffn_hidden_size // moe.expert_ffn_hidden_size,
        "routed_scaling_factor": moe.router.scaling_factor,
        "norm_topk_prob": moe.router.renormalise,
        "n_group": moe.router.num_groups or 1,
        "topk_group": moe.router.groups_per_token or 1,
    }


def _deepseek_v2_config(case: LayerCase) -> dict[str, Any]:
    # its constructor checks the attention, which is not built
    return _deepseek_config(case) | {"topk_method": "greedy", "num_attention_heads": 1}


def _gpt_oss_config(case: LayerCase) -> dict[str, Any]:
    return _mixtral_config(case) | {
        "swiglu_limit": case.activation.clamp_limit,
        "swiglu_alpha": GPT_OSS_ALPHA,
    }


def _cannot_softmax(case: LayerCase) -> str | None:
    return (
        obstacles.not_plain_softmax(case) or obstacles.not_swiglu(case) or obstacles.has_shared_expert(case)
    )


def _cannot_mixtral(case: LayerCase) -> str | None:
    # the share of an only expert is 1 either way
    is_same = case.moe.router.renormalise or case.moe.num_experts == 1
    return _cannot_softmax(case) or (None if is_same else "its router always renormalises")


def _cannot_deepseek(case: LayerCase) -> str | None:
    return (
        obstacles.not_swiglu(case)
        or obstacles.lacks_shared_expert(case)
        or obstacles.first_problem(
            (
                (
                    case.moe.shared_expert_ffn_hidden_size % case.moe.expert_ffn_hidden_size != 0,
                    "its shared expert is as wide as a whole number of routed ones",
                ),
            )
        )
    )


def _cannot_deepseek_v2(case: LayerCase) -> str | None:
    router = case.moe.router
    return _cannot_deepseek(case) or obstacles.first_problem(
        (
            (router.score_function != "softmax", f"its router has softmax, not {router.score_function}"),
            (router.renormalise, "its router does not renormalise"),
            (router.expert_bias, "its router has no balancing bias"),
            (router.num_groups is not None, "its groups count as much as their best expert alone"),
        )
    )


def _cannot_deepseek_v3(case: LayerCase) -> str | None:
    router = case.moe.router
    groups = router.groups_per_token
    return _cannot_deepseek(case) or obstacles.first_problem(
        (
            (router.score_function != "sigmoid", f"its router has sigmoid, not {router.score_function}"),
            (case.moe.num_experts // (router.num_groups or 1) < 2, "its groups have two experts or more"),
            (
                groups is not None and case.moe.top_k // groups != 2,
                "its groups count as much as their best two experts",
            ),
        )
    )


def _cannot_gpt_oss(case: LayerCase) -> str | None:
    activation = case.activation
    return (
        obstacles.not_plain_softmax(case)
        or obstacles.has_shared_expert(case)
        or obstacles.first_problem(
            (
                (not case.moe.router.renormalise, "its router always renormalises"),
                (
                    activation.kind != "clamped_swiglu",
                    f"its experts are clamped SwiGLU, not {activation.kind}",
                ),
                (activation.clamp_limit is None, "its experts clamp, and this layer has no limit"),
                (activation.linear_offset != 1.0, "its linear half has the offset 1"),
                (not case.linear_bias, "its router and experts have biases"),
            )
        )
    )


def _place_stacks(block: Any, weights: LayerWeights) -> None:
    block.gate.weight = nn.Parameter(weights.router)
    block.experts.gate_up_proj = nn.Parameter(weights.fc1)
    block.experts.down_proj = nn.Parameter(weights.fc2)


def _stack_gradients(block: Any) -> LayerWeights:
    return LayerWeights(
        router=gradient_of(block.gate.weight),
        fc1=gradient_of(block.experts.gate_up_proj),
        fc2=gradient_of(block.experts.down_proj),
    )


def _place_with_shared(block: Any, weights: LayerWeights) -> None:
    _place_stacks(block, weights)
    if weights.shared_fc1 is None or weights.shared_fc2 is None:
        raise MissingRequirementError("the block always has a shared expert, and no weights are given for it")
    gate, up = weights.shared_fc1.chunk(2)
    shared = block.shared_experts
    shared.gate_proj.weight, shared.up_proj.weight = nn.Parameter(gate), nn.Parameter(up)
    shared.down_proj.weight = nn.Parameter(weights.shared_fc2)
    if weights.expert_bias is not None:
        block.gate.e_score_correction_bias = weights.expert_bias
    elif "e_score_correction_bias" in dict(block.gate.named_buffers()):
        block.gate.e_score_correction_bias = torch.zeros(
            len(weights.router), dtype=torch.float32, device=weights.router.device
        )


def _gradients_with_shared(block: Any) -> LayerWeights:
    shared, routed = block.shared_experts, _stack_gradients(block)
    halves = [gradient_of(linear.weight) for linear in (shared.gate_proj, shared.up_proj)]
    return LayerWeights(
        **routed.named(), shared_fc1=torch.cat(halves), shared_fc2=gradient_of(shared.down_proj.weight)
    )


def _place_gpt_oss(block: Any, weights: LayerWeights) -> None:
    if weights.router_bias is None or weights.fc1_bias is None or weights.fc2_bias is None:
        raise MissingRequirementError("the block always has biases, and none are given")
    block.router.weight = nn.Parameter(weights.router)
    block.router.bias = nn.Parameter(weights.router_bias)
    experts = block.experts
    experts.gate_up_proj = nn.Parameter(interleaved(weights.fc1).transpose(1, 2).contiguous())
    experts.gate_up_proj_bias = nn.Parameter(interleaved(weights.fc1_bias))
    experts.down_proj = nn.Parameter(weights.fc2.transpose(1, 2).contiguous())
    experts.down_proj_bias = nn.Parameter(weights.fc2_bias)


def _gpt_oss_gradients(block: Any) -> LayerWeights:
    experts = block.experts
    return LayerWeights(
        router=gradient_of(block.router.weight),
        router_bias=gradient_of(block.router.bias),
        fc1=halved(gradient_of(experts.gate_up_proj).transpose(1, 2)),
        fc1_bias=halved(gradient_of(experts.gate_up_proj_bias)),
        fc2=gradient_of(experts.down_proj).transpose(1, 2),
        fc2_bias=gradient_of(experts.down_proj_bias),
    )


def interleaved(stacked: Tensor) -> Tensor:
    """[experts, 2n, ...] with the gate's rows first to one with gate and linear rows in turn."""
    return stacked.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def halved(stacked: Tensor) -> Tensor:
    """The inverse of `interleaved`."""
    return stacked.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)


BLOCKS = (
    Block(
        model="mixtral",
        config_class="MixtralConfig",
        block_class="MixtralSparseMoeBlock",
        cannot=_cannot_mixtral,
        config=_mixtral_config,
        place=_place_stacks,
        gradients=_stack_gradients,
    ),
    Block(
        model="qwen3_moe",
        config_class="Qwen3MoeConfig",
        block_class="Qwen3MoeSparseMoeBlock",
        cannot=_cannot_softmax,
        config=_qwen3_config,
        place=_place_stacks,
        gradients=_stack_gradients,
    ),
    Block(
        model="deepseek_v2",
        config_class="DeepseekV2Config",
        block_class="DeepseekV2Moe",
        cannot=_cannot_deepseek_v2,
        config=_deepseek_v2_config,
        place=_place_with_shared,
        gradients=_gradients_with_shared,
    ),
    Block(
        model="deepseek_v3",
        config_class="DeepseekV3Config",
        block_class="DeepseekV3MoE",
        cannot=_cannot_deepseek_v3,
        config=_deepseek_config,
        place=_place_with_shared,
        gradients=_gradients_with_shared,
    ),
    Block(
        model="gpt_oss",
        config_class="GptOssConfig",
        block_class="GptOssMLP",
        cannot=_cannot_gpt_oss,
        config=_gpt_oss_config,
        place=_place_gpt_oss,
        gradients=_gpt_oss_gradients,
    ),
)
"""Those that between them have the layers of the shipped recipes."""
