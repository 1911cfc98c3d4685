"""The load that a user asks for, in words or as a recorded trace, as what the busiest rank receives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moe_bench.errors import BadInputError
from moe_bench.projection.work.load import popularity_load, power_law, recipe_load, recorded_load
from moe_bench.spec.recipe import Recipe
from moe_bench.spec.routing_trace import read_trace

CHOICES = "balanced, random, power_law:ALPHA, or a JSON file with a list of tokens per expert for each layer"
_POWER_LAW = "power_law:"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadChoice:
    """How tokens are taken to be spread over the ranks of an expert-parallel group."""

    name: str
    busiest_over_mean_ratio: float
    """Tokens of the busiest rank over the mean."""


def load_choice(recipe: Recipe, choice: str | None) -> LoadChoice:
    """The load that `choice` means for `recipe`; None is what the recipe's routing mode leads to.

    Raises BadInputError for a word or a file that means nothing, or a trace of another model.
    """
    if choice is None:
        return LoadChoice(
            name=_mode_text(recipe),
            busiest_over_mean_ratio=recipe_load(recipe),
        )
    return LoadChoice(name=choice, busiest_over_mean_ratio=_ratio(recipe, choice))


def _ratio(recipe: Recipe, choice: str) -> float:
    if choice == "balanced":
        return 1.0
    if choice == "random":
        routing = recipe.routing.model_copy(update={"mode": "random_logits"})
        return recipe_load(recipe.model_copy(update={"routing": routing}))
    if choice.startswith(_POWER_LAW):
        num_experts = 0 if recipe.model.moe is None else recipe.model.moe.num_experts
        return popularity_load(recipe, power_law(num_experts, _alpha(choice)))
    if not choice.endswith(".json"):
        raise BadInputError(f"--load {choice}: unknown; write {CHOICES}")
    trace = read_trace(Path(choice), option="--load", choices=CHOICES)
    num_experts = 0 if recipe.model.moe is None else recipe.model.moe.num_experts
    for index, counts in enumerate(trace):
        if num_experts and len(counts) != num_experts:
            raise BadInputError(
                f"--load {choice}: layer {index} has {len(counts)} experts, {recipe.model.key} {num_experts};"
                " record this model"
            )
    return recorded_load(recipe, trace)


def _alpha(choice: str) -> float:
    text = choice.removeprefix(_POWER_LAW)
    try:
        alpha = float(text)
    except ValueError:
        alpha = float("nan")
    if not 0 <= alpha <= _MAX_ALPHA:
        raise BadInputError(f"--load {choice}: {text!r} is no exponent; write one from 0 to {_MAX_ALPHA:g}")
    return alpha


_MAX_ALPHA = 10.0
"""Beyond, one expert receives everything."""


def _mode_text(recipe: Recipe) -> str:
    if recipe.model.moe is None:
        return "no experts"
    return f"routing.mode {recipe.routing.mode}"
