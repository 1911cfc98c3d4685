"""Small Megatron-Core configurations for the kernel tests."""

import warnings
from typing import Any

import torch
from torch.nn import functional


def small_config(**changes: Any) -> Any:
    """Four layers of width 64 with four heads in two groups and eight experts of width 32."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    settings: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 128,
        "num_moe_experts": 8,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 32,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
        "gated_linear_unit": True,
        "activation_func": functional.silu,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "transformer_impl": "local",
        "use_cpu_initialization": True,
        "params_dtype": torch.float32,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    settings.update(changes)
    with warnings.catch_warnings():
        # Megatron-Core warns of its own defaults (cuda_graph_modules).
        warnings.simplefilter("ignore")
        if settings.get("multi_latent_attention", False):
            return MLATransformerConfig(**{**MLA, "qk_layernorm": True, **settings})
        return TransformerConfig(**settings)


MLA = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 16,
    "rope_type": "rope",
}


def gpt_oss_experts() -> dict[str, Any]:
    """GPT-OSS's activation and biases, with a clamp low enough to bite in a test."""
    from megatron.core.fusions.fused_bias_geglu import quick_gelu

    return {
        "activation_func": quick_gelu,
        "add_bias_linear": True,
        "glu_linear_offset": 1.0,
        "activation_func_clamp_value": 0.3,
    }
