"""The toys by which `verify` proves a model: full structure, one step in FP32, on one process and on two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from moe_bench.spec.model import MixtureOfExperts, ModelSpec
from moe_bench.spec.recipe import OptimizerSpec, Overlap, Recipe, Recompute, Routing
from moe_bench.spec.scale import Substitution, differences, smoke_plan
from moe_bench.spec.system import SystemSpec

VerifyLayout = Literal["1 process", "TP2 x EP2"]

_ONE_PROCESS: Mapping[str, Any] = {
    "num_gpus": 1,
    "tensor": 1,
    "pipeline": 1,
    "virtual_pipeline": 1,
    "context": 1,
    "expert": 1,
    "expert_tensor": 1,
    "layout": None,
    "sequence_parallel": False,
    "embedding_counts_as_layer": False,
    "loss_counts_as_layer": False,
    "data_sharding": "none",
}
LAYOUTS: Mapping[VerifyLayout, Mapping[str, Any]] = {
    "1 process": _ONE_PROCESS,
    # the two processes that share attention's heads share the experts as well
    "TP2 x EP2": {**_ONE_PROCESS, "num_gpus": 2, "tensor": 2, "expert": 2, "sequence_parallel": True},
}

_TOY = "toy size, same structure, and a clamp that is reached"
_ONE_STEP = "one step of one micro batch, compared number by number"
_REASONS = {
    "model": _TOY,
    "num_mtp_layers": "as many as the model was trained with",
    "system": "the proof is arithmetic and runs on the CPU",
    "precision": "compared in FP32",
    "low_precision": "compared in FP32",
    "seq_len": _TOY,
    "global_batch_size": _ONE_STEP,
    "micro_batch_size": _ONE_STEP,
    "parallel": "the layout under proof",
    "kernels": "kernels that run without a GPU",
    "dispatch": "DeepEP, HybridEP and NCCL EP need GPUs",
    "routing": "the model's own router",
    "token_drop": "Hugging Face's classes drop no token",
    "overlap": "not part of the model",
    "recompute": "not part of the model",
    "cuda_graphs": "not part of the model",
    "offload": "not part of the model",
    "optimizer": "gradients are compared in FP32 and before any clipping",
    "steps": _ONE_STEP,
    "env": "variables for GPU libraries",
    "container": "runs in this environment",
    "mcore": "not carried over to a toy",
    "patches": "not carried over to a toy",
}


def verify_recipe(recipe: Recipe, *, host: SystemSpec, layout: VerifyLayout) -> Recipe:
    """The toy of `recipe` under `layout`: three layers of its structure and its prediction modules.

    Losses beside the language model's are left out: they are part of the training, not of the model, and
    Hugging Face's classes count them differently or not at all.
    """
    toy = smoke_plan(recipe, host=host, modified=()).recipe
    return toy.model_copy(
        update={
            "model": _verify_model(toy.model),
            "num_mtp_layers": recipe.model.num_mtp_layers,
            "precision": "fp32",
            "seq_len": 64,
            "micro_batch_size": 2,
            "global_batch_size": 2,
            "parallel": toy.parallel.model_copy(update=dict(LAYOUTS[layout])),
            "kernels": toy.kernels.model_copy(update={"grouped_gemm": True}),
            "routing": Routing(mode="natural"),
            "token_drop": toy.token_drop if _is_filled(toy) else None,
            "overlap": Overlap(),
            "recompute": Recompute(),
            "optimizer": OptimizerSpec(clip_grad_norm=0.0),
        }
    )


def verify_substitutions(recipe: Recipe, toy: Recipe) -> tuple[Substitution, ...]:
    """In what the toy is not the recipe, and why."""
    return tuple(differences(recipe, toy, _REASONS))


def _is_filled(toy: Recipe) -> bool:
    """Whether the router is one that no class of Hugging Face's has, and that asks for a capacity."""
    return toy.model.moe is not None and toy.model.moe.router.choice in ("expert_choice", "gshard")


def _verify_model(toy: ModelSpec) -> ModelSpec:
    return toy.model_copy(
        update={
            "num_layers": min(toy.num_dense_layers, 1) + 2,
            "vocab_size": 256,
            "activation": toy.activation.model_copy(
                update={"clamp_limit": None if toy.activation.clamp_limit is None else 1.0}
            ),
            "moe": None if toy.moe is None else _verify_moe(toy.moe),
        }
    )


def _verify_moe(moe: MixtureOfExperts) -> MixtureOfExperts:
    router = moe.router.model_copy(
        update={"aux_loss": "none", "aux_loss_coefficient": 0.0, "z_loss_coefficient": 0.0}
    )
    changes: dict[str, Any] = {"router": router}
    if router.groups_per_token is not None and router.groups_per_token > 1:
        # A group's score is the sum of its two best experts in Hugging Face's classes, of its top_k / groups
        # best in Megatron-Core (moe_utils.py, group_limited_topk): two in DeepSeek-V3, and so here.
        changes |= {"num_experts": 16, "top_k": 2 * router.groups_per_token}
    return moe.model_copy(update=changes)
