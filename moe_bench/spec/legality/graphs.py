"""Which parts of a step can be captured as CUDA graphs, each by its own rule."""

from __future__ import annotations

from collections.abc import Iterator

from moe_bench.spec.legality.rule import Found, rule
from moe_bench.spec.recipe import Recipe

_ARGUMENTS = "megatron/training/arguments.py"
_CONFIG = "megatron/core/transformer/transformer_config.py"
_BY_LAYER = ("local", "transformer_engine")


@rule("graphs are CUDA's", "megatron/core/transformer/cuda_graphs.py:2098")
def graphs_need_a_gpu(recipe: Recipe) -> Iterator[Found]:
    if recipe.cuda_graphs.implementation != "none" and recipe.system.gpu is None:
        yield (
            "cuda_graphs.implementation",
            f"{recipe.cuda_graphs.implementation} on {recipe.system.key}, which has no GPU",
            "write none",
        )


@rule("it captures Transformer Engine's modules", "megatron/core/transformer/cuda_graphs.py:2098")
def graph_kernels(recipe: Recipe) -> Iterator[Found]:
    if (
        recipe.cuda_graphs.implementation == "transformer_engine"
        and recipe.kernels.family != "transformer_engine"
    ):
        yield (
            "cuda_graphs.implementation",
            f"transformer_engine with {recipe.kernels.family}",
            "use local, or kernels.family: transformer_engine",
        )


@rule(
    "one graph of the whole iteration has no parts, and no graph has none",
    f"{_ARGUMENTS}:1888",
    f"{_CONFIG}:2461",
)
def graph_modules(recipe: Recipe) -> Iterator[Found]:
    graphs = recipe.cuda_graphs
    if graphs.modules and graphs.implementation not in _BY_LAYER:
        yield "cuda_graphs.modules", f"some with {graphs.implementation}", "remove them"


@rule("the expert layer is captured whole, or up to the router", f"{_CONFIG}:2484")
def graph_of_experts_or_router(recipe: Recipe) -> Iterator[Found]:
    captured = _captured(recipe)
    router = {"moe_router"} | ({"moe_preprocess"} if recipe.cuda_graphs.implementation == "local" else set())
    if "moe" in captured and captured & router:
        yield "cuda_graphs.modules", "both moe and moe_router", "remove moe"


@rule("preprocessing follows the router in one capture", f"{_CONFIG}:2489")
def graph_of_preprocessing(recipe: Recipe) -> Iterator[Found]:
    captured = _captured(recipe)
    is_alone = "moe_preprocess" in captured and "moe_router" not in captured
    if is_alone and recipe.cuda_graphs.implementation == "transformer_engine":
        yield "cuda_graphs.modules", "moe_preprocess without moe_router", "add moe_router"


@rule("the model has no experts to capture", f"{_CONFIG}:2493")
def graph_of_a_dense_model(recipe: Recipe) -> Iterator[Found]:
    if recipe.model.moe is None and _captured(recipe) & {"moe", "moe_router", "moe_preprocess"}:
        yield "cuda_graphs.modules", "expert modules on a model without experts", "remove them"


@rule("the model has no dense layers to capture", f"{_CONFIG}:2501")
def graph_of_dense_layers(recipe: Recipe) -> Iterator[Found]:
    if recipe.model.moe is not None and recipe.model.num_dense_layers == 0 and "mlp" in _captured(recipe):
        yield "cuda_graphs.modules", "mlp where every layer has experts", "remove mlp"


@rule("a graph has fixed sizes, the experts' only with padding to a capacity", f"{_CONFIG}:2509")
def graph_of_experts(recipe: Recipe) -> Iterator[Found]:
    if recipe.model.moe is not None and "moe" in _captured(recipe) and not _is_padded(recipe):
        yield "cuda_graphs.modules", "moe without token_drop.pad_to_capacity", "capture moe_router instead"


@rule(
    "counting the kept tokens waits for the GPU, which a capture cannot",
    f"{_CONFIG}:2516",
    "megatron/core/transformer/moe/token_dispatcher.py:545",
)
def graph_of_counting(recipe: Recipe) -> Iterator[Found]:
    low = recipe.low_precision
    if "moe_preprocess" not in _captured(recipe) or recipe.dispatch.dispatcher != "alltoall":
        return
    if _is_padded(recipe) or recipe.model.moe is None:
        return
    if recipe.token_drop is not None:
        yield "cuda_graphs.modules", "moe_preprocess with a capacity and alltoall", "remove moe_preprocess"
    elif low is not None and low.pad_routing_map:
        yield "low_precision.pad_routing_map", "true with moe_preprocess and alltoall", "write false"


@rule(
    "the number of tokens an expert gets would have to be read from the GPU inside the capture",
    "megatron/core/transformer/moe/fused_a2a.py:108",
)
def whole_layers_need_fixed_sizes(recipe: Recipe) -> Iterator[Found]:
    graphs = recipe.cuda_graphs
    is_whole = graphs.implementation == "full_iteration" or (
        graphs.implementation in _BY_LAYER and not graphs.modules
    )
    has_budget = recipe.mcore.get("moe_expert_rank_capacity_factor") is not None
    if is_whole and recipe.model.moe is not None and not _is_padded(recipe) and not has_budget:
        yield (
            "cuda_graphs.implementation",
            f"{graphs.implementation} of whole layers, tokens per expert not fixed",
            "name modules such as attn and moe_router, or pad to a capacity",
        )


@rule("a recomputed layer is captured only with everything around it", f"{_CONFIG}:2523")
def graph_and_full_recompute(recipe: Recipe) -> Iterator[Found]:
    if recipe.recompute.granularity == "full" and recipe.cuda_graphs.implementation in _BY_LAYER:
        yield (
            "recompute.granularity",
            f"full with {recipe.cuda_graphs.implementation} graphs",
            "use selective",
        )


@rule("the recomputed layer would hold the captured router", f"{_CONFIG}:2533")
def graph_and_moe_recompute(recipe: Recipe) -> Iterator[Found]:
    if recipe.cuda_graphs.implementation != "transformer_engine" or "moe_router" not in _captured(recipe):
        return
    if recipe.recompute.granularity == "selective" and "moe" in recipe.recompute.modules:
        yield "recompute.modules", "moe with the graph of moe_router", "remove moe"


@rule("the overlap schedule runs these modules in parts", f"{_CONFIG}:2740")
def graph_and_expert_overlap(recipe: Recipe) -> Iterator[Found]:
    if recipe.cuda_graphs.implementation == "transformer_engine" and recipe.overlap.expert_parallel:
        for module in sorted(_captured(recipe) & {"moe", "mlp"}):
            yield "cuda_graphs.modules", f"{module} with overlap.expert_parallel", f"remove {module}"


@rule(
    "a captured weight gradient needs the one address that fused accumulation writes to",
    f"{_ARGUMENTS}:1838",
)
def graph_and_delayed_wgrad(recipe: Recipe) -> Iterator[Found]:
    if _captures_wgrad(recipe) and not recipe.kernels.fusions.gradient_accumulation:
        yield (
            "kernels.fusions.gradient_accumulation",
            "false with captured and delayed weight gradients",
            "write true",
        )


@rule("the delayed gradient of attention biases is not captured", f"{_ARGUMENTS}:1844")
def graph_and_delayed_bias(recipe: Recipe) -> Iterator[Found]:
    attention = recipe.model.attention
    has_bias = recipe.model.linear_bias or (attention.kind == "gqa" and attention.qkv_bias)
    if _captures_wgrad(recipe) and "attn" in _captured(recipe) and has_bias:
        yield "cuda_graphs.modules", "attn with biases and overlap.delayed_wgrad", "remove attn"


@rule("layers in host memory have no fixed address", f"{_CONFIG}:2468")
def graph_and_offloaded_layers(recipe: Recipe) -> Iterator[Found]:
    if recipe.offload.num_activation_layers and recipe.cuda_graphs.implementation in _BY_LAYER:
        yield (
            "offload.num_activation_layers",
            f"set with {recipe.cuda_graphs.implementation} graphs",
            "write 0",
        )


@rule(
    "offloading runs outside of what is captured",
    f"{_CONFIG}:2601",
    f"{_CONFIG}:2607",
    f"{_CONFIG}:2617",
    f"{_CONFIG}:2627",
    f"{_CONFIG}:2635",
)
def graph_and_offload(recipe: Recipe) -> Iterator[Found]:
    graphs, modules = recipe.cuda_graphs, recipe.offload.modules
    if not modules or graphs.implementation == "none":
        return
    inside_experts = set(modules) <= {"expert_fc1", "moe_act", "fused_group_mlp"}
    if "moe" in graphs.modules:
        yield "cuda_graphs.modules", "moe with offload.modules", "remove moe"
    elif graphs.implementation == "local" and not (inside_experts and graphs.modules):
        yield (
            "offload.modules",
            f"{', '.join(modules)} with local graphs of {', '.join(graphs.modules) or 'whole layers'}",
            "use transformer_engine graphs",
        )
    elif graphs.implementation == "full_iteration" and not _max_inflight(recipe):
        yield (
            "mcore.fine_grained_offloading_max_inflight_offloads",
            "missing with full_iteration graphs and offload.modules",
            "write 1",
        )


@rule(
    "captured collectives would use buffers that the allocator moves",
    f"{_ARGUMENTS}:1881",
    "megatron/core/transformer/cuda_graphs.py:2102",
)
def graph_environment(recipe: Recipe) -> Iterator[Found]:
    if recipe.cuda_graphs.implementation != "transformer_engine":
        return
    expands = "expandable_segments:True" in recipe.env.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if expands and recipe.env.get("NCCL_GRAPH_REGISTER") != "0":
        value = recipe.env.get("NCCL_GRAPH_REGISTER", "not set")
        yield "env.NCCL_GRAPH_REGISTER", f"{value} with expandable_segments and graphs", "write '0'"


RULES = (
    graphs_need_a_gpu, graph_kernels, graph_modules, graph_of_experts_or_router, graph_of_preprocessing,
    graph_of_a_dense_model, graph_of_dense_layers, graph_of_experts, graph_of_counting,
    whole_layers_need_fixed_sizes, graph_and_full_recompute, graph_and_moe_recompute,
    graph_and_expert_overlap, graph_and_delayed_wgrad, graph_and_delayed_bias, graph_and_offloaded_layers,
    graph_and_offload, graph_environment,
)  # fmt: skip


def _captured(recipe: Recipe) -> set[str]:
    """Modules that are captured by name."""
    graphs = recipe.cuda_graphs
    return set(graphs.modules) if graphs.implementation in _BY_LAYER else set()


def _is_padded(recipe: Recipe) -> bool:
    return recipe.token_drop is not None and recipe.token_drop.pad_to_capacity


def _captures_wgrad(recipe: Recipe) -> bool:
    """Whether a weight gradient is both delayed and inside a graph, as validate_args decides it."""
    if not (recipe.overlap.delayed_wgrad and recipe.overlap.grad_reduce):
        return False
    moe, captured = recipe.model.moe, _captured(recipe)
    has_shared = moe is not None and moe.shared_expert_ffn_hidden_size > 0
    return "attn" in captured or (
        "moe_router" in captured and has_shared and not recipe.overlap.shared_experts
    )


def _max_inflight(recipe: Recipe) -> bool:
    value = recipe.mcore.get("fine_grained_offloading_max_inflight_offloads")
    return isinstance(value, int) and value >= 0
