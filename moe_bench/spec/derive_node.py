"""A recipe on the GPUs of one node: real widths and experts per rank, as many layers as fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

from moe_bench.errors import BadInputError
from moe_bench.spec.model import MixtureOfExperts
from moe_bench.spec.recipe import HYBRIDEP_DOMAIN, DispatchSpec, Overlap, Recipe
from moe_bench.spec.scale import Plan, differences

_NODE_REASONS = {
    "model": "as many layers as fit, experts per rank kept",
    "parallel": "the GPUs that are here",
    "global_batch_size": "at most eight micro batches per rank",
    "num_mtp_layers": "as many layers as fit",
    "dispatch": "one rank has nobody to exchange tokens with",
    "overlap": "no pipeline on one node",
    "env": "as many ranks as the expert group has",
}


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
