"""A recipe's model is one that the harness builds; some models are there to be counted and projected only."""

from __future__ import annotations

from collections.abc import Iterator

from moe_bench.errors import BadInputError
from moe_bench.spec.legality.rule import Found, rule
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.recipe import Recipe


@rule("such a structure is for accounting and projection only", "moe_bench/harness/mcore_config.py")
def built_structure(recipe: Recipe) -> Iterator[Found]:
    unbuilt = (*_layers(recipe.model), *_attention(recipe.model), *_experts(recipe.model))
    if unbuilt:
        yield "model", ", ".join(unbuilt), "choose a model with recipes"


def built_model(recipe: Recipe) -> ModelSpec:
    """The model of a recipe, which the harness can build; BadInputError for one that it cannot."""
    for problem in built_structure.problems(recipe):
        raise BadInputError(f"{recipe.model.key}: {problem.problem}; {problem.fix}")
    return recipe.model


def _layers(model: ModelSpec) -> Iterator[str]:
    if model.hybrid_pattern is not None:
        yield "half layers"
    if model.gated_delta_net is not None:
        yield "gated delta nets"
    if model.compressed_attention is not None:
        yield "compressed attention"
    if model.num_residual_streams > 1:
        yield f"{model.num_residual_streams} residual streams"
    if model.activation.kind not in ("swiglu", "clamped_swiglu", "gelu"):
        yield f"{model.activation.kind} activation"
    if model.mtp_is_shared:
        yield "a shared prediction module"


def _attention(model: ModelSpec) -> Iterator[str]:
    attention = model.attention
    if model.rope.rotary_fraction == 0 and not model.learned_positions:
        yield "no rotary embedding"
    if attention.kind == "mla":
        if attention.sparse is not None:
            yield "attention to chosen keys"
        return
    if attention.output_gate:
        yield "an output gate of attention"
    if attention.chunked is not None:
        yield "attention in chunks"
    if attention.qk_norm == "without_gain":
        yield "a q/k norm without gain"


def _experts(model: ModelSpec) -> Iterator[str]:
    moe = model.moe
    if moe is None:
        return
    if moe.latent_size is not None:
        yield "experts in a latent width"
    if moe.router.score_function == "sqrt_softplus":
        yield "sqrt_softplus scores"


RULES = (built_structure,)
