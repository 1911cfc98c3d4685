"""Which activations can be computed again or moved to host memory, and beside what."""

from __future__ import annotations

from collections.abc import Iterator

from moe_bench.spec.legality.rule import Found, rule
from moe_bench.spec.recipe import Recipe

_ARGUMENTS = "megatron/training/arguments.py"
_CONFIG = "megatron/core/transformer/transformer_config.py"


@rule("it would recompute nothing, or more than it says", f"{_CONFIG}:1763")
def recompute_modules(recipe: Recipe) -> Iterator[Found]:
    recompute = recipe.recompute
    if recompute.granularity == "selective" and not recompute.modules:
        yield "recompute.modules", "none with selective", "name modules, or write granularity none"
    if recompute.granularity != "selective" and recompute.modules:
        yield "recompute.modules", f"some with {recompute.granularity}", "remove them, or write selective"


@rule("full recompute works on units of layers", f"{_CONFIG}:1743", f"{_CONFIG}:1752")
def recompute_layers(recipe: Recipe) -> Iterator[Found]:
    recompute = recipe.recompute
    if recompute.granularity == "full" and recompute.num_layers == 0:
        yield "recompute.num_layers", "0 with full", "state at least 1"
    if recompute.granularity != "full" and recompute.num_layers:
        yield "recompute.num_layers", f"{recompute.num_layers} with {recompute.granularity}", "write 0"


@rule("the model has no such module", f"{_CONFIG}:1790")
def recompute_of_what_is_there(recipe: Recipe) -> Iterator[Found]:
    model, moe = recipe.model, recipe.model.moe
    has = {
        "mla_up_proj": model.attention.kind == "mla",
        "mlp": model.num_dense_layers > 0,
        "moe": moe is not None,
        "moe_act": moe is not None,
        "shared_experts": moe is not None and moe.shared_expert_ffn_hidden_size > 0,
    }
    for module in _recomputed(recipe):
        if not has.get(module, True):
            yield "recompute.modules", f"{module} with {model.key}", f"remove {module}"


@rule("the activation is recomputed inside the grouped product", f"{_CONFIG}:1785")
def recompute_of_expert_activations(recipe: Recipe) -> Iterator[Found]:
    if "moe_act" in _recomputed(recipe) and not recipe.kernels.grouped_gemm:
        yield "recompute.modules", "moe_act without kernels.grouped_gemm", "write grouped_gemm: true"


@rule("they run on their own stream, outside of a checkpoint", f"{_CONFIG}:1817")
def recompute_of_shared_experts(recipe: Recipe) -> Iterator[Found]:
    if "shared_experts" in _recomputed(recipe) and recipe.overlap.shared_experts:
        yield "recompute.modules", "shared_experts with overlap.shared_experts", "remove shared_experts"


@rule("delayed scaling would count the recomputed maximum twice", f"{_CONFIG}:1824")
def recompute_with_delayed_scaling(recipe: Recipe) -> Iterator[Found]:
    if recipe.precision == "fp8_delayed":
        for module in ("moe_act", "layernorm"):
            if module in _recomputed(recipe):
                yield "recompute.modules", f"{module} with fp8_delayed", f"remove {module}"


@rule(
    "layers are offloaded within one pipeline rank that recomputes nothing",
    f"{_CONFIG}:1710",
    f"{_CONFIG}:1715",
    f"{_CONFIG}:1720",
)
def offloaded_layers(recipe: Recipe) -> Iterator[Found]:
    num, key = recipe.offload.num_activation_layers, "offload.num_activation_layers"
    if not num:
        return
    if num >= recipe.model.num_layers:
        yield key, f"{num} of {recipe.model.num_layers} layers", f"use at most {recipe.model.num_layers - 1}"
    if recipe.parallel.pipeline > 1:
        yield key, f"{num} with PP{recipe.parallel.pipeline}", "write 0"
    if recipe.recompute.granularity != "none":
        yield key, f"{num} with {recipe.recompute.granularity} recompute", "write 0, or recompute none"


@rule(
    "Transformer Engine does the copying",
    f"{_ARGUMENTS}:1855",
    "megatron/core/transformer/transformer_block.py:314",
)
def offload_kernels(recipe: Recipe) -> Iterator[Found]:
    offload = recipe.offload
    if recipe.kernels.family == "transformer_engine":
        return
    for key, value in (
        ("modules", offload.modules),
        ("num_activation_layers", offload.num_activation_layers),
    ):
        if value:
            yield f"offload.{key}", f"set with {recipe.kernels.family}", "remove it"


@rule("without it Transformer Engine would move weights too", f"{_ARGUMENTS}:1858")
def offload_environment(recipe: Recipe) -> Iterator[Found]:
    if recipe.offload.modules and recipe.env.get("NVTE_CPU_OFFLOAD_V1") != "1":
        value = recipe.env.get("NVTE_CPU_OFFLOAD_V1", "not set")
        yield "env.NVTE_CPU_OFFLOAD_V1", f"{value} with offload.modules", "write '1'"


@rule("modules and whole layers are offloaded by different machinery", f"{_CONFIG}:1849", f"{_CONFIG}:1906")
def two_offloads(recipe: Recipe) -> Iterator[Found]:
    offload = recipe.offload
    if offload.num_activation_layers and (offload.modules or offload.paged_stash):
        yield "offload.num_activation_layers", "set with modules or paged_stash", "write 0"


@rule("the input of the projection is the output of the core attention", f"{_CONFIG}:1869")
def offload_of_projection(recipe: Recipe) -> Iterator[Found]:
    modules = recipe.offload.modules
    if "attn_proj" in modules and "core_attn" not in modules:
        yield "offload.modules", "attn_proj without core_attn", "add core_attn"


@rule("what is recomputed with the layer has nothing to offload", f"{_CONFIG}:1878")
def offload_of_recomputed(recipe: Recipe) -> Iterator[Found]:
    inside = sorted({"moe_act", "expert_fc1", "fused_group_mlp"} & set(recipe.offload.modules))
    if inside and "moe" in _recomputed(recipe):
        yield "offload.modules", f"{', '.join(inside)} with recompute of moe", f"remove {', '.join(inside)}"


@rule("the fused expert MLP is one module", f"{_CONFIG}:1897", f"{_CONFIG}:1900")
def offload_of_fused_experts(recipe: Recipe) -> Iterator[Found]:
    modules = recipe.offload.modules
    if "fused_group_mlp" not in modules:
        return
    if not recipe.kernels.op_fuser:
        yield "offload.modules", "fused_group_mlp without kernels.op_fuser", "use expert_fc1 and moe_act"
    elif {"expert_fc1", "moe_act"} & set(modules):
        yield "offload.modules", "fused_group_mlp with its own parts", "remove expert_fc1 and moe_act"


@rule(
    "the stash holds the activations of a fixed number of tokens",
    f"{_CONFIG}:1908",
    f"{_CONFIG}:1916",
)
def paged_stash(recipe: Recipe) -> Iterator[Found]:
    if not recipe.offload.paged_stash:
        return
    if recipe.mcore.get("moe_expert_rank_capacity_factor") is None:
        yield (
            "offload.paged_stash",
            "true without mcore.moe_expert_rank_capacity_factor",
            "write false, or state one",
        )
    elif {"expert_fc1", "moe_act", "fused_group_mlp"} & set(recipe.offload.modules):
        yield "offload.modules", "expert activations with paged_stash", "remove them"


@rule("gathered low-precision weights stay on the GPU", f"{_ARGUMENTS}:1808")
def offloaded_optimizer(recipe: Recipe) -> Iterator[Found]:
    low = recipe.low_precision
    if recipe.offload.optimizer_fraction == 0 or low is None or not low.param_gather:
        return
    if recipe.precision not in ("fp8_delayed", "nvfp4"):
        yield (
            "offload.optimizer_fraction",
            f"{recipe.offload.optimizer_fraction} with param_gather in {recipe.precision}",
            "write 0, or param_gather: false",
        )


RULES = (
    recompute_modules, recompute_layers, recompute_of_what_is_there, recompute_of_expert_activations,
    recompute_of_shared_experts, recompute_with_delayed_scaling, offloaded_layers, offload_kernels,
    offload_environment, two_offloads, offload_of_projection, offload_of_recomputed, offload_of_fused_experts,
    paged_stash, offloaded_optimizer,
)  # fmt: skip


def _recomputed(recipe: Recipe) -> tuple[str, ...]:
    return recipe.recompute.modules if recipe.recompute.granularity == "selective" else ()
