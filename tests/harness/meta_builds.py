"""One rank of a job of any size, built on tensors without data: what the closed forms are held against."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

from moe_bench.harness.build import model_chunks, set_seeds, transformer_config
from moe_bench.harness.dryrun.meta_device import meta_device
from moe_bench.harness.kernels.quack import experts as quack_experts
from moe_bench.harness.loopback import Transfer, loopback_groups
from moe_bench.harness.mcore_config import megatron_arguments
from moe_bench.harness.patches import patch_names, patches
from moe_bench.harness.settings import settings_of
from moe_bench.harness.substitution import Substitution, substituted
from moe_bench.spec.recipe import Fusions, Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltTensor:
    """One parameter of a model chunk."""

    name: str
    num_elements: int
    num_columns: int
    in_expert_group: bool
    sums_over_tensor: bool


def first_rank_of(recipe: Recipe, pipeline_rank: int) -> int:
    """The first rank of a pipeline stage: stages are the slowest dimension of Megatron-Core's grid."""
    return pipeline_rank * (recipe.parallel.num_gpus // recipe.parallel.pipeline)


def built_chunks(recipe: Recipe, pipeline_rank: int) -> list[list[BuiltTensor]]:
    """Parameters of every chunk of a stage as Megatron-Core registers them; `recipe` is in torch-native form.

    Fusions, which ask for Transformer Engine and bring no parameters, are left out.
    """
    kernels = recipe.kernels.model_copy(update={"fusions": Fusions()})
    arguments = megatron_arguments(recipe.model_copy(update={"kernels": kernels}))
    with (
        warnings.catch_warnings(),
        meta_device(),
        patches(patch_names("no_transformer_engine")),
        substituted(Substitution(quack_experts, "require_quack", _is_not_needed)),
        loopback_groups(
            world_size=recipe.parallel.num_gpus,
            rank=first_rank_of(recipe, pipeline_rank),
            sizes=arguments.parallel_state,
            on_transfer=_ignore,
        ),
    ):
        warnings.simplefilter("ignore")  # Megatron-Core's own
        config = transformer_config(arguments)
        config.perform_initialization = False
        set_seeds(1)
        chunks = model_chunks(arguments, settings_of(arguments), config, device="cuda")
        destroy_moe_metrics_tracker()
        return [
            [
                BuiltTensor(
                    name=name,
                    num_elements=parameter.numel(),
                    num_columns=parameter.shape[-1] if _is_matrix(name, parameter.dim()) else 1,
                    in_expert_group=not getattr(parameter, "allreduce", True),
                    sums_over_tensor=bool(
                        getattr(parameter, "sequence_parallel", False) or _is_summed_by_name(name)
                    ),
                )
                for name, parameter in chunk.named_parameters()
            ]
            for chunk in chunks
        ]


def _is_matrix(name: str, num_axes: int) -> bool:
    """Biases of stacked experts are rows of one tensor, but vectors each."""
    return num_axes > 1 and not name.endswith("bias")


def _is_summed_by_name(name: str) -> bool:
    """distributed/finalize_model_grads.py, _allreduce_non_tensor_model_parallel_grads."""
    return "q_layernorm" in name or "k_layernorm" in name


def _is_not_needed(device_type: str) -> None:
    del device_type


def _ignore(transfer: Transfer) -> None:
    del transfer
