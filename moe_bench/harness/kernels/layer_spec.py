"""Megatron-Core's layer specs for GPT models, for either kernel family and without touching its globals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec_for_backend,
    get_mlp_module_spec_for_backend,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from moe_bench.errors import BadInputError
from moe_bench.harness.kernels.mla import TorchMLASelfAttention
from moe_bench.harness.kernels.norm import WholeVectorRMSNorm
from moe_bench.harness.kernels.provider import KernelChoice, TorchNativeSpecProvider, provider_for
from moe_bench.harness.kernels.shared_experts import BiasedSharedExperts

NormBuilder = Callable[..., torch.nn.Module]
CAUSAL = {"attn_mask_type": AttnMaskType.causal}


def decoder_block_spec(
    config: TransformerConfig,
    choice: KernelChoice,
    *,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> TransformerBlockSubmodules:
    """Specify the decoder layers of one pipeline stage and model chunk.

    Raises:
        MissingRequirementError: the family is not installed, or cannot build the model.
    """
    provider = provider_for(choice)
    layers = _all_layers(config, choice, provider)
    if config.pipeline_model_parallel_layout is not None:
        layer_ids = config.pipeline_model_parallel_layout.get_layer_id_list(
            layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank
        )
    else:
        first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
        layer_ids = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank))
    return TransformerBlockSubmodules(
        layer_specs=[layers[layer_id] for layer_id in layer_ids],
        layer_norm=provider.layer_norm(rms_norm=config.normalization == "RMSNorm"),
    )


def mtp_block_spec(
    config: TransformerConfig,
    choice: KernelChoice,
    *,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> MultiTokenPredictionBlockSubmodules | None:
    """Specify the multi-token prediction layers of one stage, None where it has none.

    Each holds a decoder layer like the model's last one (arXiv:2412.19437, section 2.2).
    """
    provider = provider_for(choice)
    last_layer = _all_layers(config, choice, provider)[-1]
    return get_gpt_mtp_block_spec_for_backend(
        config, last_layer, backend=provider, vp_stage=vp_stage, pp_rank=pp_rank
    )


def _all_layers(
    config: TransformerConfig, choice: KernelChoice, provider: BackendSpecProvider
) -> list[ModuleSpec]:
    """Specs of the whole model's decoder layers, first to last, each with the experts of its step."""
    plain = _like_layers(config, choice, provider)
    layers = list(plain)
    for first, num_experts, width in choice.expert_steps:
        for index in range(first, len(layers)):
            if _has_experts(config)[index]:
                layers[index] = _with_experts(plain[index], num_experts, width)
    return layers


def _with_experts(layer: ModuleSpec, num_experts: int, ffn_hidden_size: int) -> ModuleSpec:
    """The layer with experts of other number and width; Megatron-Core has one configuration for all."""
    mlp = partial(
        _build_with_experts,
        build=layer.submodules.mlp,
        num_moe_experts=num_experts,
        moe_ffn_hidden_size=ffn_hidden_size,
    )
    return replace(layer, submodules=replace(layer.submodules, mlp=mlp))


def _build_with_experts(
    *,
    build: Callable[..., torch.nn.Module],
    config: TransformerConfig,
    num_moe_experts: int,
    moe_ffn_hidden_size: int,
    **options: object,
) -> torch.nn.Module:
    own = copy.copy(config)
    own.num_moe_experts, own.moe_ffn_hidden_size = num_moe_experts, moe_ffn_hidden_size
    return build(config=own, **options)


def _like_layers(
    config: TransformerConfig, choice: KernelChoice, provider: BackendSpecProvider
) -> list[ModuleSpec]:
    """The same, all of whose experts are alike."""
    if not config.multi_latent_attention and config.qk_layernorm != (choice.qk_norm != "none"):
        raise BadInputError(
            f"qk_layernorm: {config.qk_layernorm} contradicts the model's qk_norm, {choice.qk_norm}; "
            "set the one that the model's authors publish"
        )
    if isinstance(provider, TorchNativeSpecProvider):
        dense, moe = (
            _layer(config, choice, provider, has_experts=has_experts) for has_experts in (False, True)
        )
        return [moe if has_experts else dense for has_experts in _has_experts(config)]
    layers = get_gpt_decoder_layer_specs(
        config, use_transformer_engine=True, normalization=config.normalization
    )
    if choice.qk_norm == "whole_vector":
        for layer in layers:
            attention = layer.submodules.self_attention.submodules
            attention.q_layernorm, attention.k_layernorm = _whole_vector_norms(config)
    return layers


def _has_experts(config: TransformerConfig) -> list[bool]:
    """Which decoder layers have experts: every n-th one from the first on, or as a list says."""
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return [layer % frequency == 0 for layer in range(config.num_layers)]
    return [bool(has_experts) for has_experts in frequency]


def _layer(
    config: TransformerConfig, choice: KernelChoice, provider: TorchNativeSpecProvider, *, has_experts: bool
) -> ModuleSpec:
    """One decoder layer. Checkpoint keys are mapped to those of the Transformer Engine family.

    That family keeps a norm in the linear layer behind it; experts have no such layer.
    """
    keys = {} if has_experts else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    if config.multi_latent_attention:
        attention = _latent_attention(config, provider)
        keys["self_attention.q_layernorm."] = "self_attention.linear_q_up_proj.layer_norm_"
        keys["self_attention.kv_layernorm."] = "self_attention.linear_kv_up_proj.layer_norm_"
    else:
        attention = _grouped_query_attention(config, choice, provider)
        keys["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=provider.layer_norm(),
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=provider.layer_norm(),
            mlp=_mlp(config, provider, has_experts=has_experts),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=keys,
        ),
    )


def _mlp(
    config: TransformerConfig, provider: TorchNativeSpecProvider, *, has_experts: bool
) -> ModuleSpec | Callable[..., torch.nn.Module]:
    """A dense MLP, or the provider's MoE layer with the submodules that Megatron-Core's spec names."""
    spec = get_mlp_module_spec_for_backend(
        backend=provider,
        num_experts=config.num_moe_experts if has_experts else None,
        moe_grouped_gemm=config.moe_grouped_gemm,
    )
    if not has_experts:
        return spec
    submodules: MoESubmodules = spec.keywords["submodules"]
    if config.add_bias_linear and config.moe_shared_expert_intermediate_size:
        mlp = MLPSubmodules(
            linear_fc1=provider.column_parallel_linear(), linear_fc2=provider.row_parallel_linear()
        )
        submodules = replace(submodules, shared_experts=partial(BiasedSharedExperts, submodules=mlp))
    return partial(provider.fused_moe_layer(), submodules=submodules)


def _latent_attention(config: TransformerConfig, provider: TorchNativeSpecProvider) -> ModuleSpec:
    latent_norm = provider.layer_norm(for_qk=True) if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=TorchMLASelfAttention,
        params=CAUSAL,
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=provider.column_parallel_linear(),
            linear_q_down_proj=provider.linear(),
            linear_q_up_proj=provider.column_parallel_linear(),
            linear_kv_down_proj=provider.linear(),
            linear_kv_up_proj=provider.column_parallel_linear(),
            core_attention=provider.core_attention(),
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=latent_norm,
            kv_layernorm=latent_norm,
        ),
    )


def _grouped_query_attention(
    config: TransformerConfig, choice: KernelChoice, provider: TorchNativeSpecProvider
) -> ModuleSpec:
    q_norm: NormBuilder
    k_norm: NormBuilder
    if choice.qk_norm == "none":
        q_norm = k_norm = IdentityOp
    elif choice.qk_norm == "per_head":
        q_norm = k_norm = provider.layer_norm(for_qk=True)
    else:
        q_norm, k_norm = _whole_vector_norms(config)
    return ModuleSpec(
        module=SelfAttention,
        params=CAUSAL,
        submodules=SelfAttentionSubmodules(
            linear_qkv=provider.column_parallel_linear(),
            core_attention=provider.core_attention(),
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=q_norm,
            k_layernorm=k_norm,
        ),
    )


def _whole_vector_norms(config: TransformerConfig) -> tuple[NormBuilder, NormBuilder]:
    """Norms over all query heads and over all key heads; SelfAttention does not pass how many there are."""
    return (
        partial(WholeVectorRMSNorm, num_heads=config.num_attention_heads),
        partial(WholeVectorRMSNorm, num_heads=config.num_query_groups),
    )
