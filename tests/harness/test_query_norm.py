"""Where Megatron-Core puts a norm before uncompressed queries, asked of its own resolver.

Transformer Engine does not load without a GPU, so its backend is stood in for by two classes: a projection,
and a norm fused with one.
"""

from types import SimpleNamespace

import pytest
from megatron.core.transformer import mla_qk_norm_config
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules

from moe_bench.analysis.params import has_query_input_norm
from moe_bench.spec.catalogue import recipes_root
from moe_bench.spec.load import Loader


class Projection:
    """TEColumnParallelLinear."""


class NormAndProjection:
    """TELayerNormColumnParallelLinear."""


class Backend:
    """What TESpecProvider answers."""

    def layer_norm(self, **options: object) -> type:
        return IdentityOp

    def column_parallel_linear(self) -> type:
        return Projection

    def column_parallel_layer_norm_linear(self) -> type:
        return NormAndProjection


@pytest.mark.parametrize("key", ["deepseek_v2_lite", "moonlight_16b_a3b", "deepseek_v3", "kimi_k2"])
def test_uncompressed_queries_get_the_fused_norm(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    attention = Loader(root=recipes_root()).model(key).attention
    assert attention.kind == "mla"
    monkeypatch.setattr(mla_qk_norm_config, "get_backend", lambda name: Backend())
    config = SimpleNamespace(
        q_lora_rank=attention.q_lora_rank,
        qk_layernorm=True,
        qk_l2_norm=False,
        experimental_attention_variant=None,
        transformer_impl="transformer_engine",
        normalization="RMSNorm",
    )
    # as gpt_layer_specs.py asks for them with Transformer Engine
    submodules = MLASelfAttentionSubmodules(
        linear_q_proj=Projection,
        linear_q_down_proj=Projection,
        linear_q_up_proj=NormAndProjection,
        linear_kv_down_proj=Projection,
        linear_kv_up_proj=NormAndProjection,
        core_attention=IdentityOp,
        linear_proj=Projection,
        q_layernorm=IdentityOp,
        kv_layernorm=IdentityOp,
    )
    resolved = QKNormConfigResolver(config, submodules).resolve()
    counted = has_query_input_norm(attention, "transformer_engine")
    assert (resolved["linear_q_proj"] is NormAndProjection) == counted
    assert counted == (attention.q_lora_rank is None)
    assert not has_query_input_norm(attention, "torch_native")
