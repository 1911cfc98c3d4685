"""Small layers with the structure of the shipped models, their weights and inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_bench.harness.layer.weights import LayerWeights, draw_weights
from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.layer_case import LayerCase, layer_case_of
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Fusions, KernelSpec
from moe_bench.spec.system import SystemSpec

BLOCKS = {
    "deepseek_v2_lite": {"deepseek_v2"},
    "deepseek_v3": {"deepseek_v3"},
    "glm_4_5_air": {"deepseek_v3"},
    "gpt_oss_120b": {"gpt_oss"},
    "gpt_oss_20b": {"gpt_oss"},
    "kimi_k2": {"deepseek_v3"},
    "mixtral_8x22b": {"mixtral", "qwen3_moe"},
    "mixtral_8x7b": {"mixtral", "qwen3_moe"},
    "moonlight_16b_a3b": {"deepseek_v3"},
    "olmoe_1b_7b": {"qwen3_moe"},
    "qwen3_235b_a22b": {"mixtral", "qwen3_moe"},
    "qwen3_30b_a3b": {"mixtral", "qwen3_moe"},
}
"""By shipped model, the blocks of transformers that compute its layer."""


def host() -> SystemSpec:
    """A machine without a GPU."""
    return Loader(root=recipes_root()).system("cpu_host")


def published_case(model: str) -> LayerCase:
    """The layer of a model's default recipe, as it is."""
    loader = Loader(root=recipes_root())
    return layer_case_of(loader.recipe(find_recipe(model, loader)))


def small_case(model: str, **changes: Any) -> LayerCase:
    """The layer of a model at toy widths in FP32, with as many of 16 experts as it chooses, on one rank."""
    case = published_case(model)
    router = case.moe.router
    if router.num_groups is not None:
        router = router.model_copy(update={"num_groups": 8})
    moe = case.moe.model_copy(
        update={
            "num_experts": 16,
            "expert_ffn_hidden_size": 32,
            "shared_expert_ffn_hidden_size": 64 if case.moe.shared_expert_ffn_hidden_size else 0,
            "router": router,
        }
    )
    sizes = {"hidden_size": 64, "num_tokens": 48, "ep_size": 1, "moe": moe, "init_std": 0.2}
    kernels = KernelSpec(family="torch_native", fusions=Fusions())
    plain = {"precision": "fp32", "low_precision": None, "kernels": kernels}
    return case.model_copy(update=sizes | plain | changes).folded()


def weights_and_inputs(case: LayerCase, *, device: str = "cpu") -> tuple[LayerWeights, Tensor, Tensor]:
    """Weights, with a balancing bias that decides some choices, inputs, and the gradient of the outputs."""
    weights = draw_weights(case, device=device)
    generator = torch.Generator(device=device).manual_seed(0)
    if weights.expert_bias is not None:
        weights.expert_bias.normal_(std=0.3, generator=generator)
    shape = (case.num_tokens, case.hidden_size)
    x, gradient = torch.randn(2, *shape, generator=generator, device=device, dtype=weights.router.dtype)
    return weights, x, gradient
