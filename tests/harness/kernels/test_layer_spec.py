"""Layer specs: which layers stand where, and that models of every kind train."""

from typing import Any

import pytest
import torch

from moe_bench.errors import BadInputError
from moe_bench.harness.kernels.layer_spec import decoder_block_spec
from moe_bench.harness.kernels.provider import KernelChoice
from tests.harness.kernels.configs import gpt_oss_experts, small_config
from tests.harness.kernels.models import NATIVE, loss_of, model
from tests.harness.kernels.ranks import Groups

KINDS: dict[str, tuple[dict[str, Any], KernelChoice]] = {
    "grouped-query attention": ({}, NATIVE),
    "norm per head": (
        {"qk_layernorm": True},
        KernelChoice(family="torch_native", device_type="cpu", qk_norm="per_head"),
    ),
    "norm over all heads": (
        {"qk_layernorm": True},
        KernelChoice(family="torch_native", device_type="cpu", qk_norm="whole_vector"),
    ),
    "latent attention": ({"multi_latent_attention": True}, NATIVE),
    "latent attention, whole queries": ({"multi_latent_attention": True, "q_lora_rank": None}, NATIVE),
    "prediction of later tokens": ({"mtp_num_layers": 1}, NATIVE),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_each_kind_trains_every_parameter(kind: str, groups: Groups) -> None:
    changes, choice = KINDS[kind]
    built = model(small_config(**changes), choice, groups)
    loss = loss_of(built)
    loss.backward()
    assert torch.isfinite(loss)
    without = [name for name, parameter in built.named_parameters() if parameter.grad is None]
    assert not without


def test_gpt_oss_builds_with_sinks_windows_and_biases(groups: Groups) -> None:
    changes = gpt_oss_experts() | {
        "softmax_type": "learnable",
        "window_size": (5, 0),
        "window_attn_skip_freq": 2,
    }
    built = model(small_config(**changes), NATIVE, groups)
    loss_of(built).backward()
    sinks = {name: p for name, p in built.named_parameters() if name.endswith("softmax_offset")}
    assert len(sinks) == 4
    assert all(sink.grad.any() for sink in sinks.values())
    assert [layer.self_attention.core_attention.window for layer in built.decoder.layers] == [
        5,
        None,
        5,
        None,
    ]


def test_leading_dense_layers_have_no_experts(groups: Groups) -> None:
    built = model(small_config(moe_layer_freq=[0, 1, 1, 1]), NATIVE, groups)
    assert [hasattr(layer.mlp, "router") for layer in built.decoder.layers] == [False, True, True, True]
    assert [layer.mlp.experts.implementation for layer in built.decoder.layers[1:]] == [
        "torch:grouped_mm"
    ] * 3
    attentions = [layer.self_attention.core_attention for layer in built.decoder.layers]
    assert [attention.implementation for attention in attentions] == ["torch:masked"] * 4


def test_every_second_layer_may_have_experts() -> None:
    specs = decoder_block_spec(small_config(moe_layer_freq=2), NATIVE, pp_rank=0).layer_specs
    assert specs[0] is specs[2]
    assert specs[1] is specs[3]
    assert specs[0] is not specs[1]


def test_a_norm_that_configuration_and_model_do_not_agree_on_is_refused() -> None:
    with pytest.raises(BadInputError, match="qk_layernorm"):
        decoder_block_spec(small_config(qk_layernorm=True), NATIVE, pp_rank=0)


def test_checkpoint_keys_are_those_of_the_transformer_engine_family(groups: Groups) -> None:
    built = model(small_config(moe_layer_freq=[0, 1, 1, 1], multi_latent_attention=True), NATIVE, groups)
    keys = {entry.key for entry in built.sharded_state_dict().values() if hasattr(entry, "key")}
    norms = {key.split(".", 3)[-1] for key in keys if "norm" in key and "decoder.layers" in key}
    assert norms == {
        "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight",
        "pre_mlp_layernorm.weight",
        "self_attention.linear_q_up_proj.layer_norm_weight",
        "self_attention.linear_kv_up_proj.layer_norm_weight",
    }
