"""Recomputation that a published row must have used: without it, what ran would not have fitted the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from moe_bench.analysis.memory import memory_fit
from moe_bench.projection.rows.inference import Assumption, InferredRun
from moe_bench.projection.rows.memory_rules import NO_RECOMPUTATION
from moe_bench.projection.rows.stack import Engine
from moe_bench.spec.mixer import MultiLatentAttention
from moe_bench.spec.recipe import Recipe, Recompute, RecomputeModule

MEMORY_RULE = "recompute inferred from memory"
_FULL = Recompute(granularity="full", method="uniform", num_layers=1)


def cannot_fit(recipe: Recipe) -> bool:
    """Whether what the fullest rank must hold exceeds the GPU's usable memory, without any margin."""
    fit = memory_fit(recipe)
    return fit.worst.total_bytes > fit.usable_bytes


def with_recompute(run: InferredRun, cannot_fit: Callable[[Recipe], bool] = cannot_fit) -> InferredRun:
    """`run` with the cheapest recomputation under which it fits, as an assumption of its own.

    Only where the row prints none, where no code of its release says that there was none, and where the run
    cannot fit without; everything else is returned as it is, and so is what does not fit recomputed in full.
    """
    is_open = any(one.field == "recompute" and one.rule == NO_RECOMPUTATION for one in run.assumptions)
    if not is_open or not cannot_fit(run.recipe):
        return run
    candidates = (run.recipe.model_copy(update={"recompute": one}) for one in settings(run))
    recipe = next((one for one in candidates if not cannot_fit(one)), None)
    if recipe is None:
        return run
    assumption = Assumption(field="recompute", value=_shown(recipe.recompute), rule=MEMORY_RULE)
    others = (one for one in run.assumptions if one.field != "recompute")
    return replace(run, recipe=recipe, assumptions=(*others, assumption))


def settings(run: InferredRun) -> Iterator[Recompute]:
    """What the run's engine can recompute, from the cheapest on.

    Megatron-Core's modules in the order of what they cost per byte that they free (docs/row_inference.md);
    the switch of Automodel recomputes whole blocks.
    """
    modules: list[RecomputeModule] = []
    for module in _modules(run.recipe) if run.stack.engine is Engine.MEGATRON else ():
        modules.append(module)
        yield Recompute(granularity="selective", modules=tuple(modules))
    yield _FULL


def _modules(recipe: Recipe) -> Iterator[RecomputeModule]:
    if recipe.model.moe is not None:
        yield "moe_act"
    yield "layernorm"
    if isinstance(recipe.model.attention, MultiLatentAttention):
        yield "mla_up_proj"
    if recipe.model.num_dense_layers:
        yield "mlp"
    if recipe.model.moe is not None and not recipe.overlap.expert_parallel:
        yield "moe"


def _shown(recompute: Recompute) -> str:
    return "+".join(recompute.modules) or recompute.granularity
