"""One rank of a recipe as a job of its own: the layers of one pipeline stage, every other size as it is.

The derived recipe is that of the whole stage: it keeps the tensor, context, expert and data parallel sizes,
and one of its ranks runs. With balanced routing all its ranks do the same work, so the share of one rank is
the whole divided by `num_gpus`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moe_bench.errors import BadInputError
from moe_bench.spec.legality.dispatch import HYBRIDEP_DOMAIN
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.pipeline import pipeline_chunks
from moe_bench.spec.recipe import CudaGraphs, KernelSpec, Offload, Overlap, Recipe, Recompute, Routing
from moe_bench.spec.scale import Plan, Scale, Substitution, adam_with_plain_states, differences, smoke_plan
from moe_bench.spec.system import SystemSpec

MIN_MOE_LAYERS = 2
_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"

_REASONS = {
    "model": "layers of one pipeline stage, or as many as fit; at least two with experts",
    "num_mtp_layers": "those of the stage",
    "parallel": "one pipeline stage with whole weights, of which one rank runs",
    "precision": "the torch-native kernels are BF16",
    "low_precision": "the torch-native kernels are BF16",
    "kernels": "torch-native kernels, the smallest form of a slice",
    "dispatch": "loopback groups stand in for the other ranks",
    "routing": "what other ranks would send is known only where all experts get equal shares",
    "overlap": "nothing is sent that could run beside computation",
    "cuda_graphs": "graphs are Transformer Engine's or Megatron-Core's, not yet captured",
    "offload": "kept on the device",
    "optimizer": "Muon, FP16 and FP8 states need Transformer Engine",
    "recompute": "the stage has no such module",
    "env": "HybridEP's domain is not read; one connection where Megatron-Core asks for it without overlap",
    "mcore": "not carried over to other kernels",
}
_TINY = "toy size, same structure"
_TINY_REASONS = dict.fromkeys(("seq_len", "micro_batch_size", "steps"), _TINY) | {
    "model": f"{_TINY}; layers of one pipeline stage, at least two with experts",
    "system": "this machine has no GPU",
    "global_batch_size": "four micro batches per rank",
    "parallel": "two where the recipe has more than one; one pipeline stage, of which one rank runs",
    "env": "variables for GPU libraries",
    "container": "runs in this environment",
    "patches": "not carried over to a toy",
}


def slice_plan(recipe: Recipe, *, fits: Callable[[Recipe], bool], modified: tuple[str, ...]) -> Plan:
    """One rank of `recipe` with as many layers of its stage as `fits` allows.

    The stage is the one with the most expert layers, the first of those. Raises BadInputError for a model
    without expert layers, and where two of them do not fit.
    """
    return _plan(recipe, scale="slice", asked=recipe, fits=fits, reasons=_REASONS, modified=modified)


def tiny_slice_plan(recipe: Recipe, *, host: SystemSpec, modified: tuple[str, ...]) -> Plan:
    """The same of the recipe's smoke toy, for machines without a GPU."""
    toy = smoke_plan(recipe, host=host, modified=modified).recipe
    return _plan(
        toy,
        scale="tiny_slice",
        asked=recipe,
        fits=lambda _: True,
        reasons=_REASONS | _TINY_REASONS,
        modified=modified,
    )


def _plan(
    recipe: Recipe,
    *,
    scale: Scale,
    asked: Recipe,
    fits: Callable[[Recipe], bool],
    reasons: Mapping[str, str],
    modified: tuple[str, ...],
) -> Plan:
    """The slice of `recipe`, with its departures from `asked`."""
    stage = _stage(recipe)
    for num_moe_layers in range(stage.num_moe_layers, MIN_MOE_LAYERS - 1, -1):
        cut = _slice_recipe(recipe, stage, num_moe_layers=num_moe_layers)
        if fits(cut):
            rows = (*differences(asked, cut, reasons), _one_rank(asked, cut))
            return Plan(recipe=cut, asked=asked.name, scale=scale, substitutions=rows, modified=modified)
    raise BadInputError(
        f"{recipe.name}: not even {MIN_MOE_LAYERS} expert layers of one rank fit a GPU of "
        f"{recipe.system.key}; use larger tensor or expert parallel sizes, or more recomputation"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    """What one pipeline rank holds, over all its chunks."""

    num_dense_layers: int
    num_moe_layers: int
    num_mtp_layers: int


def _stage(recipe: Recipe) -> _Stage:
    model, parallel = recipe.model, recipe.parallel
    if model.moe is None:
        raise BadInputError(f"{recipe.name}: a slice is of expert layers and {model.key} has none; use node")
    chunks = pipeline_chunks(parallel, num_layers=model.num_layers, num_mtp_layers=recipe.num_mtp_layers)
    held = []
    for rank in range(parallel.pipeline):
        own = [chunk for chunk in chunks if chunk.pipeline_rank == rank]
        has_experts = [model.is_moe_layer(layer) for chunk in own for layer in chunk.layers]
        held.append(
            _Stage(
                num_dense_layers=has_experts.count(False),
                num_moe_layers=max(has_experts.count(True), MIN_MOE_LAYERS),
                num_mtp_layers=sum(chunk.num_mtp_layers for chunk in own),
            )
        )
    return max(held, key=lambda stage: stage.num_moe_layers)


def _slice_recipe(recipe: Recipe, stage: _Stage, *, num_moe_layers: int) -> Recipe:
    return recipe.model_copy(
        update={
            "model": _model(recipe.model, stage, num_moe_layers=num_moe_layers),
            "num_mtp_layers": stage.num_mtp_layers,
            "parallel": _parallel(recipe.parallel),
            "precision": "fp32" if recipe.precision == "fp32" else "bf16",
            "low_precision": None,
            "kernels": KernelSpec(family="torch_native", grouped_gemm=recipe.kernels.grouped_gemm),
            "dispatch": recipe.dispatch.model_copy(
                update={"dispatcher": "alltoall", "num_sms": None, "high_priority_stream": False}
            ),
            "routing": Routing(mode="round_robin"),
            "recompute": _recompute(recipe.recompute, stage),
            "overlap": Overlap(),
            "cuda_graphs": CudaGraphs(),
            "offload": Offload(),
            "optimizer": adam_with_plain_states(recipe.optimizer),
            "env": _env(recipe),
            "mcore": {},
            "reproduces": None,
            "differences": (),
        }
    )


def _model(model: ModelSpec, stage: _Stage, *, num_moe_layers: int) -> ModelSpec:
    moe = model.moe and model.moe.model_copy(update={"num_leading_dense_layers": stage.num_dense_layers})
    return model.model_copy(update={"num_layers": stage.num_dense_layers + num_moe_layers, "moe": moe})


def _recompute(recompute: Recompute, stage: _Stage) -> Recompute:
    """Without the dense MLP, where the stage has none."""
    modules = tuple(name for name in recompute.modules if name != "mlp" or stage.num_dense_layers)
    granularity = recompute.granularity
    if granularity == "selective" and not modules:
        granularity = "none"
    return recompute.model_copy(update={"modules": modules, "granularity": granularity})


def _env(recipe: Recipe) -> dict[str, str]:
    kept = {name: value for name, value in recipe.env.items() if name != HYBRIDEP_DOMAIN}
    if _CONNECTIONS in kept and recipe.parallel.tensor * recipe.parallel.context > 1:
        kept[_CONNECTIONS] = "1"
    return kept


def _parallel(parallel: ParallelSpec) -> ParallelSpec:
    """One pipeline stage of the job, with its weights whole on every rank."""
    is_fsdp = parallel.data_sharding == "megatron_fsdp"
    return parallel.model_copy(
        update={
            "num_gpus": parallel.num_gpus // parallel.pipeline,
            "pipeline": 1,
            "virtual_pipeline": 1,
            "layout": None,
            "embedding_counts_as_layer": False,
            "loss_counts_as_layer": False,
            "num_layers_first_stage": 0,
            "num_layers_last_stage": 0,
            "micro_batch_group_size": 0,
            "context_comm": "allgather" if parallel.context > 1 else parallel.context_comm,
            "data_sharding": "distributed_optimizer" if is_fsdp else parallel.data_sharding,
        }
    )


def _one_rank(asked: Recipe, cut: Recipe) -> Substitution:
    return Substitution(
        field="ranks",
        asked=str(asked.parallel.num_gpus),
        used=f"rank 0 of {cut.parallel.num_gpus}",
        why="the others are loopback groups; embedding, loss and optimizer step of the rank are included",
    )
