"""Which modules each family provides, and what is refused."""

import importlib.util

import pytest
import torch

from moe_bench.errors import BadInputError, MissingRequirementError
from moe_bench.harness.kernels.provider import KernelChoice, TorchNativeSpecProvider, provider_for
from tests.harness.kernels.configs import gpt_oss_experts, small_config
from tests.harness.kernels.ranks import Groups

ON_A_HOST = KernelChoice(family="torch_native", device_type="cpu")


def test_torch_native_is_there() -> None:
    assert isinstance(provider_for(ON_A_HOST), TorchNativeSpecProvider)


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="Transformer Engine is installed"
)
def test_a_missing_transformer_engine_is_named_with_the_line_that_installs_it() -> None:
    with pytest.raises(MissingRequirementError, match=r"pip install .*transformer_engine"):
        provider_for(KernelChoice(family="transformer_engine", device_type="cuda"))


@pytest.mark.skipif(importlib.util.find_spec("quack") is not None, reason="quack-kernels is installed")
def test_a_missing_quack_is_named_with_the_line_that_installs_it() -> None:
    with pytest.raises(MissingRequirementError, match=r"quack-kernels, not installed; pip install"):
        provider_for(KernelChoice(family="quack", device_type="cuda"))


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(BadInputError, match="torch_native, transformer_engine, quack"):
        provider_for(KernelChoice(family="cublas", device_type="cuda"))


def test_experts_in_fp8_are_torch_native_alone(groups: Groups) -> None:
    provider = provider_for(KernelChoice(family="torch_native", device_type="cuda", experts_are_fp8=True))
    config = small_config(params_dtype=torch.bfloat16, bf16=True)
    experts = provider.grouped_mlp_modules(True)(4, config, pg_collection=groups)
    assert experts.implementation == "torch:scaled_grouped_mm:rowwise"
    on_host = provider_for(KernelChoice(family="torch_native", device_type="cpu", experts_are_fp8=True))
    with pytest.raises(MissingRequirementError, match="fp8_rowwise needs a Hopper GPU"):
        on_host.grouped_mlp_modules(True)
    with pytest.raises(MissingRequirementError, match=r"fp8_rowwise needs kernels\.family: torch_native"):
        provider_for(KernelChoice(family="transformer_engine", device_type="cuda", experts_are_fp8=True))


def test_experts_with_biases_cannot_run_one_by_one(groups: Groups) -> None:
    build = TorchNativeSpecProvider(ON_A_HOST).grouped_mlp_modules(False)
    with pytest.raises(MissingRequirementError, match="grouped_gemm"):
        build(4, small_config(num_moe_experts=4, **gpt_oss_experts()), pg_collection=groups)
