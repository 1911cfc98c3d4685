"""What a recipe runs as: itself, or a toy that fits a laptop, with every substitution as a row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal

from moe_bench.spec.base import NonNegativeInt, Spec, Text
from moe_bench.spec.mixer import GroupedQueryAttention, MultiLatentAttention
from moe_bench.spec.model import ExpertStep, MixtureOfExperts, ModelSpec
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.pipeline import expand_layout
from moe_bench.spec.recipe import (
    CudaGraphs,
    DispatchSpec,
    KernelSpec,
    Offload,
    OptimizerSpec,
    Overlap,
    Recipe,
    Steps,
)
from moe_bench.spec.system import SystemSpec

Scale = Literal["full", "node", "smoke", "slice", "tiny_slice", "dryrun"]


class Substitution(Spec):
    """One field in which what runs departs from what was asked, and why."""

    field: Text
    asked: str
    used: str
    why: Text


class Plan(Spec):
    """What will run: a recipe, what it was derived from, and how the two differ."""

    recipe: Recipe
    asked: Text
    """Name of the recipe that the user named."""
    scale: Scale
    substitutions: tuple[Substitution, ...] = ()
    modified: tuple[Text, ...] = ()
    """The user's own `key=value` changes; results made with any carry the mark `modified`."""
    rank: NonNegativeInt = 0
    """Of a slice, which rank of the recipe runs."""
    whole: Recipe | None = None
    """Of a slice, the run that it is a part of: as asked, with the slice's kernels."""

    @property
    def is_slice(self) -> bool:
        """Whether one rank runs, and loopback groups stand in for the others."""
        return self.scale in ("slice", "tiny_slice")

    @property
    def num_ranks(self) -> int:
        """Processes that run."""
        return 1 if self.is_slice else self.recipe.parallel.num_gpus

    @property
    def pipeline_rank(self) -> int:
        """Pipeline rank of `rank`: Megatron-Core's order tp-cp-ep-dp-pp has it outermost."""
        parallel = self.recipe.parallel
        return self.rank // (parallel.num_gpus // parallel.pipeline)


def full_plan(recipe: Recipe, *, modified: tuple[str, ...]) -> Plan:
    """The recipe as asked, nothing substituted."""
    return Plan(recipe=recipe, asked=recipe.name, scale="full", modified=modified)


def smoke_plan(recipe: Recipe, *, host: SystemSpec, modified: tuple[str, ...]) -> Plan:
    """A toy of `recipe` for machines without GPUs: same structure, every size above one becomes two."""
    toy = smoke_recipe(recipe, host)
    if any(change.startswith("steps.") for change in modified):
        # whoever sets the number of steps means the run at hand
        toy = toy.model_copy(update={"steps": recipe.steps})
    return Plan(
        recipe=toy,
        asked=recipe.name,
        scale="smoke",
        substitutions=tuple(differences(recipe, toy, _SMOKE_REASONS)),
        modified=modified,
    )


_SMOKE_REASONS = {
    "model": "toy size, same structure",
    "system": "this machine has no GPU",
    "precision": "FP8 and FP4 need a GPU",
    "low_precision": "FP8 and FP4 need a GPU",
    "seq_len": "toy size",
    "global_batch_size": "four micro batches per rank",
    "micro_batch_size": "toy size",
    "parallel": "two where the recipe has more than one",
    "kernels": "kernels that run without a GPU",
    "dispatch": "DeepEP, HybridEP and NCCL EP need GPUs",
    "overlap": "CUDA streams need a GPU",
    "cuda_graphs": "CUDA graphs need a GPU",
    "offload": "there is no device memory to offload from",
    "optimizer": "Muon, FP16 and FP8 states need Transformer Engine or a GPU",
    "steps": "toy run",
    "env": "variables for GPU libraries",
    "container": "runs in this environment",
    "mcore": "not carried over to a toy",
    "patches": "not carried over to a toy",
}

_NOT_COMPARED: Mapping[str, bool | set[str]] = {
    **dict.fromkeys(("reproduces", "differences", "variant", "origin"), True),
    "routing": {"trace"},
}
"""The trace is many numbers; `routing.mode` says that there is one."""


def differences(asked: Recipe, used: Recipe, reasons: Mapping[str, str]) -> Iterator[Substitution]:
    """One row per leaf that differs; the system is one row, for it is one choice."""
    # most fields are equal, and turning them into text would be most of the time of `list`
    fields = {name for name in Recipe.model_fields if getattr(asked, name) != getattr(used, name)}
    left, right = (_leaves(_compared(one, fields)) for one in (asked, used))
    for field in dict.fromkeys((*left, *right)):
        if left.get(field) != right.get(field):
            yield Substitution(
                field=field,
                asked=left.get(field, "-"),
                used=right.get(field, "-"),
                why=reasons[field.partition(".")[0]],
            )


def _compared(recipe: Recipe, fields: set[str]) -> dict[str, object]:
    tree = recipe.model_dump(mode="json", include=fields, exclude=_NOT_COMPARED)
    return {**tree, "system": recipe.system.key}


def _leaves(tree: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Every leaf that says something by its dotted path, as text."""
    leaves: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            leaves[prefix + key] = ",".join(str(item) for item in value) or "none"
        elif value is not None:
            leaves[prefix + key] = str(value)
    return leaves


def smoke_recipe(recipe: Recipe, host: SystemSpec) -> Recipe:
    """The toy of `smoke_plan`."""
    parallel = _smoke_parallel(recipe)
    num_layers = _smoke_num_layers(recipe, parallel)
    micro_batch_size = min(recipe.micro_batch_size, 2)
    num_micro_batches = 4
    return recipe.model_copy(
        update={
            "model": _smoke_model(recipe.model, num_layers=num_layers),
            "system": host,
            "precision": "fp32" if recipe.precision == "fp32" else "bf16",
            "low_precision": None,
            "reproduces": None,
            "differences": (),
            "seq_len": 64,
            "micro_batch_size": micro_batch_size,
            "global_batch_size": num_micro_batches * micro_batch_size * parallel.data,
            "parallel": parallel,
            "kernels": KernelSpec(family="torch_native", grouped_gemm=recipe.kernels.grouped_gemm),
            "dispatch": _smoke_dispatch(recipe.dispatch),
            "overlap": Overlap(
                grad_reduce=recipe.overlap.grad_reduce,
                param_gather=recipe.overlap.param_gather,
                # the batched transfers of PP2 with virtual stages are wrong, not only slow (legality)
                p2p=parallel.virtual_pipeline > 1,
            ),
            "cuda_graphs": CudaGraphs(),
            "offload": Offload(),
            "optimizer": adam_with_plain_states(recipe.optimizer),
            "steps": Steps(num_warmup=2, num_timed=5),
            "env": {},
            "container": None,
            "mcore": {},
            "patches": (),
        }
    )


def _smoke_parallel(recipe: Recipe) -> ParallelSpec:
    asked = recipe.parallel
    tensor, pipeline, context, expert, expert_tensor, virtual = (
        min(size, 2)
        for size in (
            asked.tensor,
            asked.pipeline,
            asked.context,
            asked.expert,
            asked.expert_tensor,
            asked.virtual_pipeline,
        )
    )
    num_processes = math.lcm(tensor * context * pipeline, expert * expert_tensor * pipeline)
    has_expert_replicas = num_processes > expert * expert_tensor * pipeline
    if asked.data_sharding == "megatron_fsdp" and not has_expert_replicas and num_processes <= 4:
        # Megatron-FSDP scales accumulated expert gradients wrongly where an expert has one replica
        num_processes *= 2
    return asked.model_copy(
        update={
            "num_gpus": num_processes,
            "tensor": tensor,
            "pipeline": pipeline,
            "virtual_pipeline": virtual,
            "context": context,
            "context_comm": "allgather" if context > 1 else asked.context_comm,
            "expert": expert,
            "expert_tensor": expert_tensor,
            "layout": _smoke_layout(recipe, pipeline * virtual),
            "num_layers_first_stage": 0,
            "num_layers_last_stage": 0,
            "micro_batch_group_size": 0,
            "num_optimizer_instances": 1,
        }
    )


def _smoke_layout(recipe: Recipe, num_chunks: int) -> str | None:
    """A layout string of `num_chunks` stages that begins and ends like the recipe's.

    MTP stands beside the loss: alone on a stage it would fall on the first of two ranks, where Megatron-Core
    allows none.
    """
    if recipe.parallel.layout is None:
        return None
    stages = expand_layout(recipe.parallel.layout)
    first = "Et" if "t" in stages[0] else "E"
    last = ("t" if "t" in stages[-1] else "") + "m" * recipe.num_mtp_layers + "L"
    return "|".join([first, *["tt"] * (num_chunks - 2), last])


def _smoke_num_layers(recipe: Recipe, parallel: ParallelSpec) -> int:
    if parallel.layout is not None:
        return "".join(expand_layout(parallel.layout)).count("t")
    num_pseudo_layers = parallel.embedding_counts_as_layer + parallel.loss_counts_as_layer
    moe = recipe.model.moe
    fewest = 2 + min(recipe.model.num_dense_layers, 1)
    if moe is not None and moe.every_n_layers > 1:
        fewest = 2 * moe.every_n_layers
    per_chunk = 1
    while per_chunk * parallel.num_chunks - num_pseudo_layers < fewest or (
        num_pseudo_layers and per_chunk < 2
    ):
        per_chunk += 1
    return per_chunk * parallel.num_chunks - num_pseudo_layers


def _smoke_model(model: ModelSpec, *, num_layers: int) -> ModelSpec:
    return model.model_copy(
        update={
            "num_layers": num_layers,
            "hidden_size": 64,
            "vocab_size": 512,
            "dense_ffn_hidden_size": None if model.dense_ffn_hidden_size is None else 128,
            "attention": _smoke_attention(model),
            "moe": None if model.moe is None else _smoke_moe(model.moe),
        }
    )


def _smoke_attention(model: ModelSpec) -> GroupedQueryAttention | MultiLatentAttention:
    attention = model.attention
    if attention.kind == "mla":
        return attention.model_copy(
            update={
                "num_heads": 4,
                "q_lora_rank": None if attention.q_lora_rank is None else 32,
                "kv_lora_rank": 32,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 8,
                "v_head_dim": 16,
            }
        )
    window = attention.sliding_window
    return attention.model_copy(
        update={
            "num_heads": 4,
            "num_query_groups": 4 if attention.num_query_groups == attention.num_heads else 2,
            "head_dim": 16,
            "sliding_window": None if window is None else window.model_copy(update={"window_tokens": 16}),
        }
    )


def _smoke_moe(moe: MixtureOfExperts) -> MixtureOfExperts:
    step = ExpertStep(from_layer=moe.every_n_layers, num_experts=16, expert_ffn_hidden_size=48)
    is_grouped = moe.router.num_groups is not None and moe.router.num_groups > 1
    router = (
        moe.router.model_copy(update={"num_groups": 4, "groups_per_token": 2}) if is_grouped else moe.router
    )
    return moe.model_copy(
        update={
            "num_experts": 8,
            "top_k": min(moe.top_k, 2),
            "expert_ffn_hidden_size": 32,
            "shared_expert_ffn_hidden_size": 32 if moe.shared_expert_ffn_hidden_size else 0,
            "num_leading_dense_layers": min(moe.num_leading_dense_layers, 1),
            "steps": (step,) if moe.steps else (),
            "router": router,
        }
    )


def _smoke_dispatch(dispatch: DispatchSpec) -> DispatchSpec:
    is_flex = dispatch.dispatcher not in ("allgather", "alltoall")
    return dispatch.model_copy(
        update={
            "dispatcher": "alltoall" if is_flex else dispatch.dispatcher,
            "num_sms": None,
            "high_priority_stream": False,
        }
    )


def adam_with_plain_states(optimizer: OptimizerSpec) -> OptimizerSpec:
    """BF16 moments stay: the torch-native family has an Adam for them."""
    return optimizer.model_copy(
        update={
            "name": "adam",
            "main_params_dtype": "fp32",
            "exp_avg_dtype": "bf16" if optimizer.exp_avg_dtype == "bf16" else "fp32",
            "exp_avg_sq_dtype": "bf16" if optimizer.exp_avg_sq_dtype == "bf16" else "fp32",
        }
    )
