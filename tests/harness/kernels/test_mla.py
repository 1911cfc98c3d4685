"""Multi-latent attention: its projections, and its gradients on two tensor-parallel ranks."""

from typing import Any

import pytest
import torch

from moe_bench.errors import MissingRequirementError
from tests.harness.kernels.configs import small_config
from tests.harness.kernels.models import NATIVE, model, replicated_gradients
from tests.harness.kernels.ranks import Groups


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


def test_compressed_queries_have_a_norm_of_their_own(groups: Groups) -> None:
    attention = (
        model(small_config(multi_latent_attention=True), NATIVE, groups).decoder.layers[0].self_attention
    )
    shapes = {name: tuple(parameter.shape) for name, parameter in attention.named_parameters()}
    assert shapes == {
        "linear_q_down_proj.weight": (32, 64),
        "linear_q_up_proj.weight": (4 * 24, 32),
        "q_layernorm.weight": (32,),
        "linear_kv_down_proj.weight": (16 + 8, 64),
        "linear_kv_up_proj.weight": (4 * 32, 16),
        "kv_layernorm.weight": (16,),
        "linear_proj.weight": (64, 4 * 16),
    }


@pytest.mark.parametrize("q_lora_rank", [32, None])
def test_gradients_are_the_same_on_two_tensor_parallel_ranks(q_lora_rank: int | None, run_ranks: Any) -> None:
    """Above all that of the positional key, which the heads of both ranks share."""
    changes = {"multi_latent_attention": True, "q_lora_rank": q_lora_rank}
    (whole,) = run_ranks(replicated_gradients, 1, {}, changes, NATIVE)
    assert any("linear_kv_down_proj" in name for name in whole)
    for rank in run_ranks(replicated_gradients, 2, {"tensor_model_parallel_size": 2}, changes, NATIVE):
        assert rank.keys() == whole.keys()
        for name, gradient in rank.items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6, msg=name)


def build_without_sequence_parallel(groups: Groups) -> str:
    config = small_config(
        multi_latent_attention=True, tensor_model_parallel_size=2, moe_layer_freq=[0, 0, 0, 0]
    )
    with pytest.raises(MissingRequirementError) as caught:
        model(config, NATIVE, groups)
    return str(caught.value)


def test_tensor_parallelism_without_sequence_parallelism_is_refused(run_ranks: Any) -> None:
    for message in run_ranks(build_without_sequence_parallel, 2, {"tensor_model_parallel_size": 2}):
        assert "needs sequence parallelism" in message
