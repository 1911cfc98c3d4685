"""What GShard's two experts, Sinkhorn's balancing, expert choice and capacities ask of a recipe's rest."""

from __future__ import annotations

from collections.abc import Iterator

from moe_bench.spec.legality.rule import Found, nearest_divisor, rule
from moe_bench.spec.recipe import Recipe

_ROUTER = "megatron/core/transformer/moe/router.py"
_CONFIG = "megatron/core/transformer/transformer_config.py"
_DISPATCHER = "megatron/core/transformer/moe/token_dispatcher.py:550"
_OURS = "moe_bench/harness/routers.py"
_KEY = "model.moe.router"


@rule("Sinkhorn's balancing weighs by plain scores, and knows no other limit or loss", f"{_ROUTER}:277")
def sinkhorn(recipe: Recipe) -> Iterator[Found]:
    moe = recipe.model.moe
    if moe is None or moe.router.choice != "sinkhorn":
        return
    score = "sigmoid" if moe.top_k == 1 else "softmax"
    if moe.router.score_function != score:
        what = f"{moe.router.score_function} with sinkhorn and top-{moe.top_k}"
        yield f"{_KEY}.score_function", what, f"write {score}"
    yield from _plain_scores(recipe, "sinkhorn")


@rule("a capacity works beside balancing losses, or none", f"{_CONFIG}:1681")
def sinkhorn_capacity(recipe: Recipe) -> Iterator[Found]:
    if recipe.token_drop is not None and _choice(recipe) == "sinkhorn":
        yield "token_drop", "a capacity with sinkhorn", "remove the block"


@rule("Sinkhorn's rounds go on until the host has read that they change little", f"{_ROUTER}:295")
def sinkhorn_and_graphs(recipe: Recipe) -> Iterator[Found]:
    if _choice(recipe) == "sinkhorn":
        yield from _captured_router(recipe, "sinkhorn")


@rule(
    "two experts with softmax weights that sum to one, the first of the sequence first",
    "arXiv:2006.16668, algorithm 1",
)
def gshard(recipe: Recipe) -> Iterator[Found]:
    moe, drop = recipe.model.moe, recipe.token_drop
    if moe is None or moe.router.choice != "gshard":
        return
    router = moe.router
    asked = (
        ("model.moe.top_k", moe.top_k != 2, f"{moe.top_k}", "2"),
        (f"{_KEY}.score_function", router.score_function != "softmax", router.score_function, "softmax"),
        (f"{_KEY}.renormalise", not router.renormalise, "false", "true"),
        (f"{_KEY}.num_groups", router.num_groups is not None, f"{router.num_groups}", "null"),
        (f"{_KEY}.scaling_factor", router.scaling_factor != 1.0, f"{router.scaling_factor}", "1.0"),
        (f"{_KEY}.aux_loss", router.aux_loss not in ("none", "aux_loss"), router.aux_loss, "aux_loss"),
        ("kernels.fusions.router", recipe.kernels.fusions.router, "true", "false"),
        ("token_drop.policy", drop is not None and drop.policy == "probs", "probs", "position"),
    )
    for key, is_asked, value, fix in asked:
        if is_asked:
            yield key, f"{value} with gshard", f"write {fix}"


@rule("dispatchers count on two rows of every token where experts have no capacity", _DISPATCHER)
def gshard_capacity(recipe: Recipe) -> Iterator[Found]:
    if _choice(recipe) == "gshard" and recipe.token_drop is None:
        yield "token_drop", "null with gshard", "write {capacity_factor: 1.0, policy: position}"


@rule("a captured graph would draw the second experts of one micro batch for all", _OURS)
def gshard_and_graphs(recipe: Recipe) -> Iterator[Found]:
    if _choice(recipe) == "gshard":
        yield from _captured_router(recipe, "gshard")


@rule("experts weigh tokens by their softmax, and are balanced without a loss", "arXiv:2202.09368, 3.2")
def expert_choice(recipe: Recipe) -> Iterator[Found]:
    moe = recipe.model.moe
    if moe is None or moe.router.choice != "expert_choice":
        return
    if moe.router.score_function != "softmax":
        yield f"{_KEY}.score_function", f"{moe.router.score_function} with expert_choice", "write softmax"
    yield from _plain_scores(recipe, "expert_choice")


@rule("every expert takes its whole capacity", "arXiv:2202.09368, 3.2")
def expert_choice_capacity(recipe: Recipe) -> Iterator[Found]:
    if _choice(recipe) == "expert_choice" and not (recipe.token_drop and recipe.token_drop.pad_to_capacity):
        what = "null" if recipe.token_drop is None else "not padded"
        yield (
            "token_drop",
            f"{what} with expert_choice",
            "write {capacity_factor: 1.0, pad_to_capacity: true}",
        )


@rule("tokens are dealt out through their own choice", _OURS)
def recorded_choice(recipe: Recipe) -> Iterator[Found]:
    choice = _choice(recipe)
    if recipe.routing.mode == "recorded" and choice not in (None, "top_k", "gshard"):
        yield "routing.mode", f"recorded with {choice}", "use natural"


@rule("an expert cannot be filled with more tokens than a rank has", f"{_OURS}")
def padded_capacity(recipe: Recipe) -> Iterator[Found]:
    moe, drop = recipe.model.moe, recipe.token_drop
    if moe is None or drop is None or not drop.pad_to_capacity:
        return
    limit = min(moe.expert_counts) / moe.top_k
    for name in ("capacity_factor", "eval_capacity_factor"):
        factor = getattr(drop, name)
        if factor is not None and factor > limit:
            what = f"{factor} x top-{moe.top_k} of {moe.num_experts} experts, padded"
            yield f"token_drop.{name}", what, f"use at most {limit:g}"


@rule("what is read of all experts at once has one number of them", _OURS)
def expert_steps(recipe: Recipe) -> Iterator[Found]:
    moe = recipe.model.moe
    if moe is None or not moe.steps:
        return
    starts = [step.from_layer for step in moe.steps]
    if starts != sorted(set(starts)) or starts[-1] >= recipe.model.num_layers:
        what = f"layers {', '.join(map(str, starts))} of {recipe.model.num_layers}"
        yield "model.moe.steps", what, "name layers of the model in order, each once"
    expert = recipe.parallel.expert
    if moe.common_num_experts % expert and not moe.num_experts % expert:
        counts = " and ".join(map(str, moe.expert_counts))
        fix = f"use {nearest_divisor(moe.common_num_experts, expert)}"
        yield "parallel.expert", f"EP{expert}, {counts} experts", fix
    if moe.router.num_groups is not None:
        yield f"{_KEY}.num_groups", f"{moe.router.num_groups} with steps of experts", "write null"
    if moe.router.expert_bias:
        # stacked over layers in megatron/core/distributed/finalize_model_grads.py
        yield f"{_KEY}.expert_bias", "true with steps of experts", "write false"
    if recipe.routing.mode == "recorded":
        yield "routing.mode", "recorded with steps of experts", "use natural"
    if moe.top_k > min(step.num_experts for step in moe.steps):
        fewest = min(step.num_experts for step in moe.steps)
        yield "model.moe.top_k", f"{moe.top_k} of {fewest} experts", f"use {fewest}"


def _plain_scores(recipe: Recipe, choice: str) -> Iterator[Found]:
    """Options of top-k that a router of another choice does not read."""
    moe = recipe.model.moe
    if moe is None:
        return
    router = moe.router
    asked = (
        ("renormalise", router.renormalise, "true", "false"),
        ("num_groups", router.num_groups is not None, f"{router.num_groups}", "null"),
        ("scaling_factor", router.scaling_factor != 1.0, f"{router.scaling_factor}", "1.0"),
        ("expert_bias", router.expert_bias and router.score_function == "sigmoid", "true", "false"),
        ("aux_loss", router.aux_loss != "none", router.aux_loss, "none"),
    )
    for name, is_asked, value, fix in asked:
        if is_asked:
            yield f"{_KEY}.{name}", f"{value} with {choice}", f"write {fix}"
    if recipe.kernels.fusions.router:
        yield "kernels.fusions.router", f"true with {choice}", "write false"


def _captured_router(recipe: Recipe, choice: str) -> Iterator[Found]:
    """CUDA graphs that hold the router."""
    graphs = recipe.cuda_graphs
    if graphs.implementation == "none":
        return
    if graphs.implementation == "full_iteration" or not graphs.modules:
        yield "cuda_graphs.implementation", f"{graphs.implementation} of whole layers", "capture attn alone"
    elif {"moe", "moe_router"} & set(graphs.modules):
        yield "cuda_graphs.modules", f"the router with {choice}", "capture attn alone"


def _choice(recipe: Recipe) -> str | None:
    return None if recipe.model.moe is None else recipe.model.moe.router.choice


RULES = (
    gshard, gshard_capacity, gshard_and_graphs, sinkhorn, sinkhorn_capacity, sinkhorn_and_graphs,
    expert_choice, expert_choice_capacity, recorded_choice, padded_capacity, expert_steps,
)  # fmt: skip
