"""One rank of a recipe, run alone in its own place of the job: its layers, layout, kernels and schedule.

The derived recipe is the recipe with as many micro batches as show its steady state. One of its ranks runs,
through the pipeline schedule of that rank, so as many micro batches are in flight as in the full run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moe_bench.errors import BadInputError
from moe_bench.spec.kernel_family import with_kernels
from moe_bench.spec.legality.dispatch import FLEX
from moe_bench.spec.pipeline import Chunk
from moe_bench.spec.recipe import (
    HYBRIDEP_DOMAIN,
    CudaGraphs,
    DispatchSpec,
    KernelFamily,
    Overlap,
    Recipe,
    Recompute,
    Routing,
    Steps,
)
from moe_bench.spec.routing_trace import busiest_expert_rank
from moe_bench.spec.scale import Plan, Scale, Substitution, differences, smoke_plan
from moe_bench.spec.steady_state import num_micro_batches_to_run
from moe_bench.spec.system import SystemSpec

MIN_MOE_LAYERS = 2
BALANCED = Routing(mode="round_robin")
STEPS = Steps(num_warmup=3, num_timed=8)
_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
_RANK_CAPACITY = "moe_expert_rank_capacity_factor"

_KERNELS = "--kernels, and what they cannot have"
_REASONS = {
    "model": "layers of the rank that fit beside its states; at least two with experts",
    "num_mtp_layers": "layers of the rank that fit",
    "parallel": "stages of the layers that fit; keys gathered where the kernels know no ring",
    "global_batch_size": "as many micro batches as show what every further one does",
    "precision": _KERNELS,
    "low_precision": _KERNELS,
    "kernels": _KERNELS,
    "optimizer": _KERNELS,
    "offload": _KERNELS,
    "mcore": _KERNELS,
    "dispatch": "loopback groups stand in for the other ranks",
    "routing": "other ranks are taken to send what this one does, which equal shares and recordings allow",
    "overlap": "nothing is sent that could run beside computation",
    "cuda_graphs": "stand-ins for other ranks copy and count on the host, which takes no part in a replay",
    "recompute": "the stage has no such module, or the kernels make it again in any case",
    "steps": "enough for one rank",
    "env": "HybridEP's domain is not read; one connection where Megatron-Core asks for it without overlap",
}
_TINY = "toy size, same structure"
_TINY_REASONS = dict.fromkeys(("seq_len", "micro_batch_size", "model", "num_mtp_layers"), _TINY) | {
    "steps": "toy run",
    "system": "this machine has no GPU",
    "global_batch_size": "four micro batches per rank",
    "parallel": "two where the recipe has more than one",
    "env": "variables for GPU libraries",
    "container": "runs in this environment",
    "patches": "not carried over to a toy",
    "mcore": "not carried over to a toy",
    **dict.fromkeys(
        ("precision", "low_precision", "kernels", "optimizer", "offload"), "kernels that run without a GPU"
    ),
}

Fits = Callable[[Recipe, int], bool]
"""Whether pipeline rank i of a recipe, alone on a GPU, fits its memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceChoice:
    """What a user may choose of a slice."""

    kernels: KernelFamily | None = None
    """None keeps the recipe's."""
    routing: Routing = BALANCED
    stage: int | None = None
    """Pipeline rank; None takes the first of those with most expert layers."""


def slice_plan(
    recipe: Recipe, *, fits: Fits, modified: tuple[str, ...], choice: SliceChoice | None = None
) -> Plan:
    """One rank of `recipe` with as many of its layers as `fits` allows.

    Raises BadInputError for a model without expert layers, a stage that does not exist, and where two expert
    layers do not fit.
    """
    choice = choice or SliceChoice()
    family = choice.kernels or recipe.kernels.family
    alone = recipe.model_copy(update={"dispatch": _dispatch(recipe.dispatch)})
    return _plan(
        # what a family fuses depends on who carries the tokens
        with_kernels(alone, family),
        whole=with_kernels(recipe, family),
        scale="slice",
        asked=recipe,
        fits=fits,
        reasons=_REASONS,
        modified=modified,
        choice=choice,
    )


def tiny_slice_plan(
    recipe: Recipe, *, host: SystemSpec, modified: tuple[str, ...], choice: SliceChoice | None = None
) -> Plan:
    """The same of the recipe's smoke toy, for machines without a GPU.

    Raises BadInputError as `slice_plan`, and for kernels that need a GPU.
    """
    choice = choice or SliceChoice()
    if choice.kernels not in (None, "torch_native"):
        raise BadInputError(f"--kernels {choice.kernels}: a tiny_slice runs on a CPU; use torch_native")
    toy = smoke_plan(recipe, host=host, modified=modified).recipe
    return _plan(
        toy,
        whole=toy,
        scale="tiny_slice",
        asked=recipe,
        fits=lambda _, __: True,
        reasons=_REASONS | _TINY_REASONS,
        modified=modified,
        choice=choice,
    )


def _plan(
    recipe: Recipe,
    *,
    whole: Recipe,
    scale: Scale,
    asked: Recipe,
    fits: Fits,
    reasons: Mapping[str, str],
    modified: tuple[str, ...],
    choice: SliceChoice,
) -> Plan:
    """The slice of `recipe`, with its departures from `asked`; `whole` is the job that it stands for."""
    stage = _stage(recipe, choice)
    steps = recipe.steps if any(change.startswith("steps.") for change in modified) else STEPS
    own = _alone(recipe, stage, choice.routing, steps=steps if scale == "slice" else recipe.steps)
    num_moe_layers = _num_moe_layers(recipe, stage)
    moe = recipe.model.moe
    # layers that are left out renumber those behind them, which would have the experts of others
    fewest = num_moe_layers if moe is not None and moe.steps else MIN_MOE_LAYERS
    for num_left_out in range(max(1, num_moe_layers - fewest + 1)):
        cut = _without(own, stage, num_left_out) if num_left_out else own
        if fits(cut, stage):
            rank = _rank(cut, stage)
            rows = (*differences(asked, cut, reasons), _one_rank(cut, rank))
            return Plan(
                recipe=cut,
                asked=asked.name,
                scale=scale,
                substitutions=rows,
                modified=modified,
                rank=rank,
                whole=whole,
            )
    raise BadInputError(
        f"{recipe.name}: not even {fewest} expert layers of one rank fit a GPU of "
        f"{recipe.system.key}; use larger tensor or expert parallel sizes, or more recomputation"
    )


def _stage(recipe: Recipe, choice: SliceChoice) -> int:
    """The pipeline rank that runs."""
    if recipe.model.moe is None:
        raise BadInputError(
            f"{recipe.name}: a slice is of expert layers and {recipe.model.key} has none; use node"
        )
    pipeline = recipe.parallel.pipeline
    if choice.stage is None:
        return max(range(pipeline), key=lambda rank: _num_moe_layers(recipe, rank))
    if not 0 <= choice.stage < pipeline:
        raise BadInputError(f"--stage {choice.stage}: the recipe has stages 0 to {pipeline - 1}; name one")
    return choice.stage


def _num_moe_layers(recipe: Recipe, stage: int) -> int:
    return sum(map(recipe.model.is_moe_layer, _layers(recipe.chunks(), stage)))


def _layers(chunks: tuple[Chunk, ...], stage: int) -> list[int]:
    return [layer for chunk in chunks if chunk.pipeline_rank == stage for layer in chunk.layers]


def _alone(recipe: Recipe, stage: int, routing: Routing, *, steps: Steps) -> Recipe:
    """The recipe as a rank runs it alone."""
    is_capped = _RANK_CAPACITY in recipe.mcore
    own = recipe.model_copy(
        update={
            "dispatch": _dispatch(recipe.dispatch),
            "routing": routing,
            "recompute": _recompute(recipe),
            "overlap": Overlap(
                grad_reduce=recipe.overlap.grad_reduce,
                param_gather=recipe.overlap.param_gather,
                align_param_gather=recipe.overlap.align_param_gather,
                p2p=recipe.overlap.p2p,
            ),
            "cuda_graphs": CudaGraphs(),
            "offload": recipe.offload.model_copy(update={"paged_stash": False})
            if is_capped
            else recipe.offload,
            "steps": steps,
            "env": _env(recipe),
            "mcore": {key: value for key, value in recipe.mcore.items() if key != _RANK_CAPACITY},
            "reproduces": None,
            "differences": (),
        }
    )
    num_micro_batches = num_micro_batches_to_run(own)
    return own.model_copy(
        update={"global_batch_size": num_micro_batches * own.micro_batch_size * own.parallel.data}
    )


def _dispatch(dispatch: DispatchSpec) -> DispatchSpec:
    """Loopback groups stand in for all-gather and all-to-all alone."""
    if dispatch.dispatcher not in FLEX:
        return dispatch
    return dispatch.model_copy(
        update={"dispatcher": "alltoall", "num_sms": None, "high_priority_stream": False}
    )


def _recompute(recipe: Recipe) -> Recompute:
    """Without the dense MLP, where the model as it runs has none."""
    recompute = recipe.recompute
    modules = tuple(name for name in recompute.modules if name != "mlp" or recipe.model.num_dense_layers)
    granularity = "none" if recompute.granularity == "selective" and not modules else recompute.granularity
    return recompute.model_copy(update={"modules": modules, "granularity": granularity})


def _env(recipe: Recipe) -> dict[str, str]:
    kept = {name: value for name, value in recipe.env.items() if name != HYBRIDEP_DOMAIN}
    is_split = recipe.parallel.tensor * recipe.parallel.context > 1
    if _CONNECTIONS in kept and is_split and recipe.parallel.data_sharding != "megatron_fsdp":
        kept[_CONNECTIONS] = "1"
    return kept


def _without(recipe: Recipe, stage: int, num_left_out: int) -> Recipe:
    """The recipe without so many expert layers of one stage, the last ones first, chunk by chunk in turn."""
    chunks, model = recipe.chunks(), recipe.model
    num_layers = {chunk: len(chunk.layers) for chunk in chunks}
    own = [chunk for chunk in reversed(chunks) if chunk.pipeline_rank == stage]
    num_moe = {chunk: sum(map(model.is_moe_layer, chunk.layers)) for chunk in own}
    for _ in range(num_left_out):
        fullest = max(own, key=lambda chunk: num_moe[chunk])
        num_moe[fullest] -= 1
        num_layers[fullest] -= 1
    update: dict[str, object] = {
        "embedding_counts_as_layer": False,
        "loss_counts_as_layer": False,
        "num_layers_first_stage": 0,
        "num_layers_last_stage": 0,
    }
    if recipe.parallel.pipeline > 1:
        update["layout"] = "|".join(_letters(chunk, num_layers[chunk]) for chunk in chunks)
    return recipe.model_copy(
        update={
            "model": model.model_copy(update={"num_layers": sum(num_layers.values())}),
            "parallel": recipe.parallel.model_copy(update=update),
        }
    )


def _letters(chunk: Chunk, num_layers: int) -> str:
    """One stage of Megatron-Core's layout string."""
    return "E" * chunk.has_embedding + "t" * num_layers + "m" * chunk.num_mtp_layers + "L" * chunk.has_loss


def _rank(recipe: Recipe, stage: int) -> int:
    """The first rank of the stage; with a recording the one whose experts receive most."""
    parallel = recipe.parallel
    first = stage * (parallel.num_gpus // parallel.pipeline)
    if recipe.routing.mode != "recorded":
        return first
    busiest = busiest_expert_rank(recipe.routing.trace, num_ranks=parallel.expert)
    return first + busiest * parallel.expert_tensor


def _one_rank(cut: Recipe, rank: int) -> Substitution:
    parallel, chunks = cut.parallel, cut.chunks()
    stage = rank // (parallel.num_gpus // parallel.pipeline)
    layers = _layers(chunks, stage)
    num_moe = sum(map(cut.model.is_moe_layer, layers))
    what = f"{len(layers)} layers, {num_moe} with experts"
    return Substitution(
        field="ranks",
        asked=str(parallel.num_gpus),
        used=f"rank {rank}, stage {stage} of {parallel.pipeline}: {what}",
        why="loopback groups stand in for the others",
    )
