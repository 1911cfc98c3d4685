"""A recipe's model is one that the harness builds; some models are there to be counted and projected only."""

from __future__ import annotations

from collections.abc import Iterator

from moe_bench.errors import BadInputError
from moe_bench.spec.legality.rule import Found, rule
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.recipe import Recipe
from moe_bench.spec.yaml_tree import dotted


@rule("this structure is for accounting and projection only", "moe_bench/harness/mcore_config.py")
def built_structure(recipe: Recipe) -> Iterator[Found]:
    yield from _layers(recipe.model)
    yield from _attention(recipe.model)
    yield from _experts(recipe.model)


def built_model(recipe: Recipe) -> ModelSpec:
    """The model of a recipe, which the harness can build; BadInputError for one that it cannot."""
    for problem in built_structure.problems(recipe):
        raise BadInputError(f"{dotted(problem.path)}: {problem.problem}; {problem.fix}")
    return recipe.model


def _layers(model: ModelSpec) -> Iterator[Found]:
    if model.hybrid_pattern is not None:
        yield "model.hybrid_pattern", "half layers", "choose a model of whole layers"
    if model.gated_delta_net is not None:
        yield "model.gated_delta_net", "linear attention", "choose a model without"
    if model.compressed_attention is not None:
        yield "model.compressed_attention", "compressed attention", "choose a model without"
    if model.num_residual_streams > 1:
        yield "model.num_residual_streams", str(model.num_residual_streams), "write 1"
    if model.activation.kind not in ("swiglu", "clamped_swiglu"):
        yield "model.activation.kind", model.activation.kind, "write swiglu"
    if model.mtp_is_shared:
        yield "model.mtp_is_shared", "one module for every depth", "write false"


def _attention(model: ModelSpec) -> Iterator[Found]:
    if model.rope.rotary_fraction == 0:
        yield "model.rope.rotary_fraction", "no rotary embedding", "write 1.0"
    if model.attention.kind == "mla":
        if model.attention.sparse is not None:
            yield "model.attention.sparse", "attention to chosen keys", "write null"
        return
    if model.attention.output_gate:
        yield "model.attention.output_gate", "true", "write false"
    if model.attention.chunked is not None:
        yield "model.attention.chunked", "attention in chunks", "write null"
    if model.attention.qk_norm == "without_gain":
        yield "model.attention.qk_norm", "a norm without gain", "write per_head"


def _experts(model: ModelSpec) -> Iterator[Found]:
    moe = model.moe
    if moe is None:
        return
    if moe.every_n_layers > 1:
        yield "model.moe.every_n_layers", str(moe.every_n_layers), "write 1"
    if moe.latent_size is not None:
        yield "model.moe.latent_size", str(moe.latent_size), "write null"
    if moe.router.score_function == "sqrt_softplus":
        yield "model.moe.router.score_function", moe.router.score_function, "write sigmoid"


RULES = (built_structure,)
