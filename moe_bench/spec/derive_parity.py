"""What may be compared on its loss, what is plain beside a recipe, and what a toy of it leaves out."""

from __future__ import annotations

from types import MappingProxyType

from moe_bench.errors import BadInputError
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.recipe import (
    CudaGraphs,
    KernelSpec,
    Offload,
    OptimizerSpec,
    Overlap,
    Precision,
    Recipe,
    Recompute,
)
from moe_bench.spec.scale import Plan, differences, smoke_recipe

ROUNDOFF_FRACTIONS: MappingProxyType[Precision, float] = MappingProxyType(
    {
        "fp32": 2.0**-24,
        "bf16": 2.0**-8,
        "fp8_delayed": 2.0**-4,
        "fp8_tensorwise": 2.0**-4,
        "fp8_blockwise": 2.0**-4,
        "fp8_rowwise": 2.0**-4,
        "mxfp8": 2.0**-4,
        "nvfp4": 2.0**-2,
    }
)
"""Unit roundoff 2^-p of the format that matrix products take: p = 24 bits of significand in FP32, 8 in BF16,
4 in E4M3 (arXiv:2209.05433), 2 in E2M1 (OCP Microscaling Formats 1.0)."""

UNREACHED_NORM = 1e9
"""Clips no gradient; that of a toy is about 2."""


def nudge_fraction(base: Recipe, variant: Recipe) -> float:
    """One rounding of the coarser of the two precisions."""
    return max(ROUNDOFF_FRACTIONS[base.precision], ROUNDOFF_FRACTIONS[variant.precision])


def require_causal(recipe: Recipe) -> None:
    """Raise BadInputError where a token's experts depend on later tokens.

    Such a router or capacity sees what the model is to predict (arXiv:2202.09368, section 7), and what it
    sees is a rank's micro batch, so that another layout is another model.
    """
    moe = recipe.model.moe
    if moe is None or recipe.routing_is_causal:
        return
    if not moe.router.is_causal:
        who, remedy = f"the {moe.router.choice} router", "compare a top_k router"
    else:
        who = "token_drop.policy: a capacity that keeps the largest probabilities (probs)"
        remedy = "compare with position, or with token_drop null"
    raise BadInputError(
        f"{recipe.name}: {who} sees later tokens of a rank's micro batch, so its loss is not that of "
        f"predicting them, and no two layouts have the same; {remedy}"
    )


def require_comparable(plan: Plan) -> None:
    """Raise BadInputError where losses of `plan` say nothing of another setting's.

    A slice is one rank alone. Weights that are built in FP8 or FP4 have a copy of what Megatron-Core drew,
    from which the optimizer begins (distrib_optimizer.py, get_high_precision_init_val), and that draw is
    another one in every layout.
    """
    require_causal(plan.recipe)
    if plan.is_slice:
        raise BadInputError(
            f"{plan.asked}: a slice is one rank of the model, and its loss not that of a prediction; drop "
            "--scale, or take --scale node or smoke"
        )
    low = plan.recipe.low_precision
    if plan.recipe.system.gpu is not None and low is not None and low.param_gather:
        raise BadInputError(
            f"{plan.asked}: low_precision.param_gather: weights built in {plan.recipe.precision} begin with "
            "Megatron-Core's own draw, another one in each layout; add --set low_precision.param_gather=false"
        )


def plain_plan(toy: Plan) -> Plan:
    """What `toy` is held against: `plain_recipe`, and every field in which it is not what was asked."""
    why = "the plain setting that others are held against"
    return _substituted(toy, plain_recipe(toy.recipe), why=why)


def plain_recipe(recipe: Recipe) -> Recipe:
    """The same model in the same precision on one process, without what is there for speed or size.

    Losses of two precisions are not held against each other: weights in BF16 begin on its grid, so that their
    first updates are rounded alike, which no run in FP32 shows (3e-3 nats in the third step of a toy).

    A capacity counts the tokens of a rank, so where there is one what divides a sequence stays, and so does
    the dispatcher: Megatron-Core's all-gather does not fill up to it (moe/token_dispatcher.py).
    """
    asked, dispatcher = recipe.parallel, "allgather"
    parallel = ParallelSpec(num_gpus=1, data_sharding="none")
    if recipe.token_drop is not None:
        dispatcher = recipe.dispatch.dispatcher
        names = ("tensor", "context", "context_comm", "sequence_parallel")
        kept = {name: getattr(asked, name) for name in names}
        num_gpus = asked.tensor * asked.context
        parallel = parallel.model_copy(update={**kept, "num_gpus": num_gpus})
    # a loop over experts with biases writes into a view that autograd protects (legality)
    kernels = KernelSpec(family="torch_native", grouped_gemm=recipe.model.linear_bias)
    return recipe.model_copy(
        update={
            "parallel": parallel,
            "kernels": kernels,
            "dispatch": recipe.dispatch.model_copy(update={"dispatcher": dispatcher}),
            "recompute": Recompute(),
            "overlap": Overlap(),
            "cuda_graphs": CudaGraphs(),
            "offload": Offload(),
            "optimizer": _with_fp32_state(recipe.optimizer),
        }
    )


def fp32_plan(toy: Plan) -> Plan:
    """`toy` in FP32, where rounding hides no mistake in the arithmetic of its other settings."""
    return _substituted(toy, fp32_recipe(toy.recipe), why="compared in FP32, where rounding hides little")


def fp32_recipe(recipe: Recipe) -> Recipe:
    """`recipe` in FP32, gradients and the optimizer's state included."""
    optimizer = _with_fp32_state(recipe.optimizer)
    return recipe.model_copy(update={"precision": "fp32", "low_precision": None, "optimizer": optimizer})


def watched_plan(plan: Plan) -> Plan:
    """`plan` with gradient norms: Megatron-Core computes none where it clips none."""
    return _substituted(plan, _watched(plan.recipe), why="the same, with the norm computed")


def _watched(recipe: Recipe) -> Recipe:
    if recipe.optimizer.clip_grad_norm:
        return recipe
    optimizer = recipe.optimizer.model_copy(update={"clip_grad_norm": UNREACHED_NORM})
    return recipe.model_copy(update={"optimizer": optimizer})


def _with_fp32_state(optimizer: OptimizerSpec) -> OptimizerSpec:
    names = ("gradient_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
    return optimizer.model_copy(update=dict.fromkeys(names, "fp32"))


def toy_of(plan: Plan) -> Recipe:
    """The toy of what `plan` runs, at whatever scale; of a slice, that of the run that it is a part of."""
    whole = plan.recipe if plan.whole is None else plan.whole
    return whole if plan.scale == "smoke" else smoke_recipe(whole, whole.system)


def settings_of_toy(toy: Recipe) -> tuple[object, ...]:
    """Equal for two toys that learn by the same computation: a comparison of one speaks for the other.

    Left out is what names, places or times a run, and what `training_plan` fixes for every toy. A recipe's
    sizes are in its toy only as far as they make a difference there: EP32 and EP64 are both EP2.
    """
    recipe = _watched(toy)
    facts = (getattr(recipe.model, name) for name in _FACTS)
    return (*facts, *(getattr(recipe, name) for name in _SETTINGS))


_NO_FACTS = {"display_name", "hf_id", "hf_model_type", "default_run", "published", "sources"}
_NO_SETTINGS = {
    *("model", "system", "variant", "reproduces", "differences", "origin"),
    *("routing", "global_batch_size", "steps", "seed", "env", "container"),
}
_FACTS = tuple(name for name in ModelSpec.model_fields if name not in _NO_FACTS)
_SETTINGS = tuple(name for name in Recipe.model_fields if name not in _NO_SETTINGS)


def unseen_settings(plan: Plan, toy: Recipe) -> tuple[str, ...]:
    """What `plan` runs and `toy` does not, sizes aside, as `field=value`: no comparison of `toy` is of it."""
    whole = plan.recipe if plan.whole is None else plan.whole
    # no field of the model counts, and turning it into text takes longer than all others
    same_model = toy.model_copy(update={"model": whole.model})
    rows = differences(whole, same_model, dict.fromkeys(Recipe.model_fields, "not in the toy"))
    return tuple(
        f"{row.field}={row.asked}"
        for row in rows
        if (row.field in _KEPT or not row.field.startswith(_SIZES)) and row.asked not in _OFF
    )


_SIZES = (
    *("model.", "seq_len", "global_batch_size", "micro_batch_size", "steps.", "seed"),
    *("system", "env.", "container", "routing."),
    *(f"parallel.{size}" for size in ("num_gpus", "tensor", "context", "expert", "expert_tensor")),
    *("parallel.pipeline", "parallel.virtual_pipeline", "parallel.layout", "parallel.num_layers_"),
)
"""Fields, or how they begin, in which a toy may differ without being another computation."""
_KEPT = ("parallel.context_comm",)
_OFF = ("-", "False", "0", "0.0", "none")


def changes_between(base: Recipe, variant: Recipe) -> tuple[str, ...]:
    """What `variant` changes of `base`, as `key=value`."""
    rows = differences(base, variant, dict.fromkeys(Recipe.model_fields, "varied"))
    return tuple(f"{row.field}={row.used}" for row in rows)


def require_same_model(base: Plan, variant: Plan) -> None:
    """Raise BadInputError where two recipes have other models, whose losses say nothing of their settings.

    Toys of one model may have other depths, where their pipelines have other stages.
    """
    model = {"model": base.recipe.model, "num_mtp_layers": base.recipe.num_mtp_layers}
    changes = changes_between(variant.recipe.model_copy(update=model), variant.recipe)
    if changes:
        raise BadInputError(
            f"{variant.asked}: at {variant.scale} scale another model than {base.asked} "
            f"({', '.join(changes)}); compare recipes of one model and depth, or one recipe with --vary"
        )


def _substituted(plan: Plan, recipe: Recipe, *, why: str) -> Plan:
    """`plan` with `recipe` in the place of its own, and every field in which it is not what was asked."""
    rows = {row.field: row for row in plan.substitutions}
    for row in differences(plan.recipe, recipe, dict.fromkeys(Recipe.model_fields, why)):
        asked = rows[row.field].asked if row.field in rows else row.asked
        rows[row.field] = row.model_copy(update={"asked": asked})
    kept = tuple(row for row in rows.values() if row.asked != row.used)
    return plan.model_copy(update={"recipe": recipe, "substitutions": kept})
