"""The same recipe at a size that fits a laptop or one node, with every substitution as a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Literal

from moe_bench.errors import BadInputError
from moe_bench.spec.base import NonNegativeInt, Spec, Text
from moe_bench.spec.model import (
    ExpertStep,
    GroupedQueryAttention,
    MixtureOfExperts,
    ModelSpec,
    MultiLatentAttention,
)
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.pipeline import expand_layout
from moe_bench.spec.recipe import (
    HYBRIDEP_DOMAIN,
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


def node_plan(
    recipe: Recipe, *, num_gpus: int, fits: Callable[[Recipe], bool], modified: tuple[str, ...]
) -> Plan:
    """`recipe` on `num_gpus` GPUs: real widths and experts per rank, as many layers as `fits` allows.

    Raises BadInputError where the tensor and context sizes alone need more GPUs, or no layer fits.
    """
    parallel = recipe.parallel
    if num_gpus % (parallel.tensor * parallel.context):
        raise BadInputError(
            f"{recipe.name} needs TP{parallel.tensor} x CP{parallel.context} GPUs at least; "
            f"{num_gpus} are no multiple of that; use another --num-gpus"
        )
    fewest = recipe.model.num_dense_layers + 2
    for num_layers in range(recipe.model.num_layers, fewest - 1, -1):
        cut = _node_recipe(recipe, num_gpus=num_gpus, num_layers=num_layers)
        if fits(cut):
            return Plan(
                recipe=cut,
                asked=recipe.name,
                scale="node",
                substitutions=tuple(differences(recipe, cut, _NODE_REASONS)),
                modified=modified,
            )
    raise BadInputError(f"{recipe.name}: not even {fewest} layers fit {num_gpus} GPUs; use more of them")


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

_NODE_REASONS = {
    "model": "as many layers as fit, experts per rank kept",
    "parallel": "the GPUs that are here",
    "global_batch_size": "at most eight micro batches per rank",
    "num_mtp_layers": "as many layers as fit",
    "dispatch": "one rank has nobody to exchange tokens with",
    "overlap": "no pipeline on one node",
    "env": "as many ranks as the expert group has",
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


def _node_recipe(recipe: Recipe, *, num_gpus: int, num_layers: int) -> Recipe:
    parallel, moe = recipe.parallel, recipe.model.moe
    expert = math.gcd(parallel.expert, num_gpus // parallel.expert_tensor)
    if parallel.data_sharding == "megatron_fsdp" and num_gpus == expert * parallel.expert_tensor:
        # Megatron-FSDP scales accumulated expert gradients wrongly where an expert has one replica
        expert = math.gcd(expert, max(1, expert // 2))
    group = expert * parallel.expert_tensor
    kept_moe = (
        None if moe is None else _fewer_experts(moe.up_to(num_layers), keep=Fraction(expert, parallel.expert))
    )
    node = parallel.model_copy(
        update={
            "num_gpus": num_gpus,
            "pipeline": 1,
            "virtual_pipeline": 1,
            "layout": None,
            "expert": expert,
            "embedding_counts_as_layer": False,
            "loss_counts_as_layer": False,
            "num_layers_first_stage": 0,
            "num_layers_last_stage": 0,
            "micro_batch_group_size": 0,
            "num_optimizer_instances": 1,
        }
    )
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"num_layers": num_layers, "moe": kept_moe}),
            "parallel": node,
            "global_batch_size": recipe.micro_batch_size * node.data * min(recipe.num_micro_batches, 8),
            "dispatch": _node_dispatch(recipe.dispatch, group),
            "overlap": _node_overlap(recipe.overlap, expert=expert),
            "env": {
                name: str(math.gcd(int(value), group)) if name == HYBRIDEP_DOMAIN else value
                for name, value in recipe.env.items()
            },
            "reproduces": None,
            "differences": (),
        }
    )


def _node_dispatch(dispatch: DispatchSpec, group: int) -> DispatchSpec:
    """DeepEP and its like exchange tokens; alone a rank has nobody to do it with."""
    is_flex = dispatch.dispatcher not in ("allgather", "alltoall")
    return dispatch.model_copy(update={"dispatcher": "alltoall"}) if is_flex and group == 1 else dispatch


def _node_overlap(overlap: Overlap, *, expert: int) -> Overlap:
    """What overlaps without a pipeline, and without expert ranks where there is one."""
    off = {"p2p": False, "param_gather_with_optimizer_step": False, "align_param_gather": False}
    if expert == 1:
        off |= {"expert_parallel": False, "delayed_wgrad": False}
    return overlap.model_copy(update=off)


def _fewer_experts(moe: MixtureOfExperts, *, keep: Fraction) -> MixtureOfExperts:
    """The share `keep` of all experts, with routing groups that still divide them."""
    router, num_experts = moe.router, int(moe.num_experts * keep)
    steps = tuple(step.model_copy(update={"num_experts": int(step.num_experts * keep)}) for step in moe.steps)
    if router.num_groups and num_experts % router.num_groups:
        router = router.model_copy(update={"num_groups": None, "groups_per_token": None})
    return moe.model_copy(
        update={
            "num_experts": num_experts,
            "top_k": min(moe.top_k, num_experts, *(step.num_experts for step in steps)),
            "steps": steps,
            "router": router,
        }
    )
