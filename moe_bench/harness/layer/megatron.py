"""Megatron-Core's MoELayer as an engine, once for each family of kernels that its experts can have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from megatron.core.fp4_utils import get_fp4_context
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moe_bench.errors import MissingRequirementError, MoeBenchError
from moe_bench.harness.build import set_seeds, transformer_config
from moe_bench.harness.implementations import expert_layer_name
from moe_bench.harness.kernels.layer_spec import decoder_block_spec
from moe_bench.harness.kernels.provider import KernelChoice, provider_for
from moe_bench.harness.layer.engine import BuiltLayer
from moe_bench.harness.layer.weights import LayerWeights, clear_gradients, gradients_of, load_weights
from moe_bench.harness.loopback import loopback_groups
from moe_bench.harness.mcore_config import MegatronArguments, megatron_arguments
from moe_bench.harness.requirements import require_runnable
from moe_bench.harness.settings import settings_of
from moe_bench.spec.derive_layer import case_on, layer_obstacle, layer_recipe
from moe_bench.spec.layer_case import LayerCase
from moe_bench.spec.recipe import KernelFamily, Recipe
from moe_bench.spec.system import SystemSpec

RANK = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronEngine:
    """One family, as a rank of a job whose other ranks are loopback groups (moe_bench/harness/loopback.py).

    With `ep_size` 1 nothing stands in for anything. Beyond, dispatch and combine are copies on this device,
    and what comes back from the others is what they would return to a rank with this one's experts.
    """

    family: KernelFamily
    is_grouped: bool
    """Whether experts run in grouped GEMMs; False is Megatron-Core's SequentialMLP."""
    system: SystemSpec
    """That the layer runs on; `gpu: null` for a CPU."""

    @property
    def name(self) -> str:
        """`megatron torch_native`, or `megatron torch_native SequentialMLP`."""
        return f"megatron {self.family}" + ("" if self.is_grouped else " SequentialMLP")

    @property
    def key(self) -> str:
        """As options name it: the family, or `sequential`."""
        return self.family if self.is_grouped else "sequential"

    @property
    def package(self) -> str:
        """Distribution that its kernels come from."""
        packages = {"transformer_engine": "transformer-engine", "quack": "quack-kernels"}
        return packages.get(self.family, "megatron-core")

    def obstacle(self, case: LayerCase) -> str | None:
        """What is missing here, in the words that a recipe would stop with."""
        if (illegal := layer_obstacle(self.case_for(case), self.system)) is not None:
            return illegal
        try:
            arguments = megatron_arguments(self._recipe(case))
            require_runnable(arguments)
            provider_for(_choice(arguments, device="cpu" if self.system.gpu is None else "cuda"))
        except MoeBenchError as error:
            return str(error)
        return None

    @contextlib.contextmanager
    def build(self, case: LayerCase, weights: LayerWeights, *, device: str) -> Iterator[BuiltLayer]:
        """The layer with the weights in it; process groups exist until the block ends."""
        if (obstacle := self.obstacle(case)) is not None:
            raise MissingRequirementError(f"{self.name}: {obstacle}")
        arguments = megatron_arguments(self._recipe(case))
        with loopback_groups(
            world_size=case.ep_size,
            rank=RANK,
            sizes=arguments.parallel_state,
            on_transfer=lambda transfer: None,
        ):
            try:
                layer = self._layer(arguments, case, device=device)
                load_weights(layer, weights)
                yield BuiltLayer(
                    forward=lambda x: _forward(layer, x),
                    gradients=lambda: gradients_of(layer),
                    clear_gradients=lambda: clear_gradients(layer),
                    implementation=expert_layer_name(layer),
                    module=layer,
                )
            finally:
                destroy_moe_metrics_tracker()

    def case_for(self, case: LayerCase) -> LayerCase:
        """The case on this engine's kernels (moe_bench/spec/derive_layer.py)."""
        return case_on(case, self.family, self.system, is_grouped=self.is_grouped)

    def _recipe(self, case: LayerCase) -> Recipe:
        return layer_recipe(self.case_for(case), self.system)

    def _layer(self, arguments: MegatronArguments, case: LayerCase, *, device: str) -> MoELayer:
        config = transformer_config(arguments)
        set_seeds(case.seed)
        block = decoder_block_spec(config, _choice(arguments, device=device))
        spec: Any = block.layer_specs[0].submodules.mlp
        with _quantized(config, is_init=True):
            layer = spec(config=config, pg_collection=get_default_pg_collection(), is_mtp_layer=False)
        layer.set_layer_number(1)
        layer.to(device)
        if self.case_for(case).kernels.fusions.gradient_accumulation:
            # what data parallelism gives them: the products add to it, and leave `grad` alone
            for parameter in layer.parameters():
                parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        return layer


def _choice(arguments: MegatronArguments, *, device: str) -> KernelChoice:
    """As a whole model is built (moe_bench/harness/build.py); there is no attention."""
    settings = settings_of(arguments)
    return KernelChoice(
        family=settings.kernel_family,
        device_type=device,
        experts_are_fp8=settings.experts_are_fp8,
        fusions=frozenset(settings.triton_fusions),
    )


def megatron_engines(system: SystemSpec) -> tuple[MegatronEngine, ...]:
    """Every family on `system`, the looped one last; which of them run here, `obstacle` says."""
    grouped: tuple[KernelFamily, ...] = ("torch_native", "quack", "transformer_engine")
    return (
        *(MegatronEngine(family=family, is_grouped=True, system=system) for family in grouped),
        MegatronEngine(family="torch_native", is_grouped=False, system=system),
    )


def engine_for(case: LayerCase, system: SystemSpec) -> MegatronEngine:
    """The engine that the case's kernels name."""
    return MegatronEngine(family=case.kernels.family, is_grouped=case.kernels.grouped_gemm, system=system)


def engine_named(name: str, system: SystemSpec) -> MegatronEngine:
    """The engine with this key."""
    return next(one for one in megatron_engines(system) if one.key == name)


def expert_layer(built: BuiltLayer) -> MoELayer:
    """The module of a layer that a Megatron engine built."""
    if not isinstance(built.module, MoELayer):
        raise MissingRequirementError(f"{built.implementation}: not a layer of Megatron-Core")
    return built.module


def _forward(layer: MoELayer, x: Tensor) -> Tensor:
    """[tokens, hidden] through a layer that takes [sequence, batch, hidden]."""
    with _quantized(layer.config, is_init=False):
        output, bias = layer(x.unsqueeze(1))
    if bias is not None:
        raise MissingRequirementError("the layer leaves a bias to be added; such experts are not read here")
    return output.squeeze(1)


def _quantized(config: TransformerConfig, *, is_init: bool) -> AbstractContextManager[Any]:
    """Transformer Engine's arithmetic of the layer, which Megatron-Core's block sets around its layers
    (transformer/transformer_block.py); nothing in BF16.
    """
    context = get_fp4_context if config.fp4 else get_fp8_context
    return cast("AbstractContextManager[Any]", context(config, is_init=is_init))
