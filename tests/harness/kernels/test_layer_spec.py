"""Layer specs: which layers stand where, that whole models train, and that ranks agree with one process."""

from typing import Any

import pytest
import torch

from moe_bench.errors import BadInputError
from moe_bench.harness.kernels.layer_spec import KernelChoice, decoder_block_spec, mtp_block_spec
from moe_bench.harness.kernels.provider import kernels_in
from tests.harness.kernels.configs import gpt_oss_experts, small_config
from tests.harness.kernels.ranks import Groups

NATIVE = KernelChoice(family="torch_native", device_type="cpu")
VOCABULARY = 64
NUM_TOKENS = 16


def model(config: Any, choice: KernelChoice, groups: Groups) -> Any:
    """A GPT model of one stage, float32, with its head."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    return GPTModel(
        config=config,
        transformer_layer_spec=decoder_block_spec(config, choice),
        vocab_size=VOCABULARY,
        max_sequence_length=NUM_TOKENS,
        position_embedding_type="none" if config.multi_latent_attention else "rope",
        mtp_block_spec=mtp_block_spec(config, choice) if config.mtp_num_layers else None,
        pg_collection=groups,
    )


def loss_of(built: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (1, NUM_TOKENS + 1), generator=generator)
    positions = torch.arange(NUM_TOKENS)[None]
    return built(
        tokens[:, :-1], positions, None, labels=tokens[:, 1:], loss_mask=torch.ones(1, NUM_TOKENS)
    ).mean()


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
    assert kernels_in(built) == {"torch:grouped_mm": 3, "torch:masked": 4}


def test_every_second_layer_may_have_experts() -> None:
    specs = decoder_block_spec(small_config(moe_layer_freq=2), NATIVE, pp_rank=0).layer_specs
    assert specs[0] is specs[2]
    assert specs[1] is specs[3]
    assert specs[0] is not specs[1]


def test_the_latent_norm_stands_before_keys_and_values_alone_where_queries_are_whole(groups: Groups) -> None:
    """DeepSeek-V2-Lite: no norm before the query projection, which Megatron-Core's own spec would add."""
    config = small_config(multi_latent_attention=True, q_lora_rank=None)
    attention = model(config, NATIVE, groups).decoder.layers[0].self_attention
    names = {name for name, _ in attention.named_parameters()}
    assert names == {
        "linear_q_proj.weight",
        "linear_kv_down_proj.weight",
        "linear_kv_up_proj.weight",
        "kv_layernorm.weight",
        "linear_proj.weight",
    }


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


def latent_attention_gradients(groups: Groups) -> dict[str, torch.Tensor]:
    """Gradients of one model's down-projections and latent norms, summed over ranks where they are marked."""
    size = groups.tp.size()
    config = small_config(
        multi_latent_attention=True,
        tensor_model_parallel_size=size,
        sequence_parallel=size > 1,
        expert_tensor_parallel_size=1,
        moe_layer_freq=[0, 0, 0, 0],
    )
    torch.manual_seed(3)
    built = model(config, NATIVE, groups)
    loss_of(built).backward()
    found = {}
    for name, parameter in built.named_parameters():
        if "down_proj" in name or "_layernorm" in name:
            gradient = parameter.grad.clone()
            if parameter.sequence_parallel:
                torch.distributed.all_reduce(gradient, group=groups.tp)
            found[name] = gradient
    return found


def test_latent_attention_has_the_same_gradients_on_two_tensor_parallel_ranks(run_ranks: Any) -> None:
    """The positional key's gradient reaches the down-projection from the heads of both ranks."""
    (whole,) = run_ranks(latent_attention_gradients, 1, {})
    for rank in run_ranks(latent_attention_gradients, 2, {"tensor_model_parallel_size": 2}):
        assert rank.keys() == whole.keys()
        for name, gradient in rank.items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6, msg=name)
