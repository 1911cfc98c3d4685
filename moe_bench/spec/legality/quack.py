"""What the kernel family quack asks for, whose experts gather their rows (harness/kernels/quack)."""

from __future__ import annotations

from collections.abc import Iterator

from moe_bench.spec.legality.rule import Found, nearest_multiples, rule
from moe_bench.spec.recipe import Recipe

_EXPERTS = "moe_bench/harness/kernels/quack"
_QUACK = "quack-kernels 0.6.5, quack"
ALIGNMENT = 8
"""BF16 elements of 16 bytes."""


@rule("its kernels are compiled for GPUs", f"{_QUACK}/gemm.py:753")
def quack_needs_a_gpu(recipe: Recipe) -> Iterator[Found]:
    if _is_quack(recipe) and recipe.system.gpu is None:
        yield "kernels.family", f"quack on {recipe.system.key}, which has no GPU", "use torch_native"


@rule("its experts multiply in BF16", f"{_EXPERTS}/products.py")
def quack_precision(recipe: Recipe) -> Iterator[Found]:
    if _is_quack(recipe) and recipe.precision == "fp32":
        yield "precision", "fp32 with quack", "use bf16"


@rule(
    "the gated epilogues weight neither a bias nor clamp what they activate", f"{_QUACK}/gemm_interface.py:86"
)
def quack_activation(recipe: Recipe) -> Iterator[Found]:
    activation = recipe.model.activation
    if not _is_quack(recipe):
        return
    if activation.kind != "swiglu" or activation.clamp_limit is not None or recipe.model.linear_bias:
        biases = ", experts with biases" if recipe.model.linear_bias else ""
        yield "kernels.family", f"quack with {activation.kind}{biases}", "use torch_native"


@rule("bulk copies address rows of 16 bytes", f"{_QUACK}/gemm_tvm_ffi_utils.py")
def quack_widths(recipe: Recipe) -> Iterator[Found]:
    moe = recipe.model.moe
    if moe is None or not _is_quack(recipe):
        return
    for key, width in (
        ("model.hidden_size", recipe.model.expert_hidden_size),
        ("model.moe.expert_ffn_hidden_size", moe.expert_ffn_hidden_size),
    ):
        if width % ALIGNMENT:
            yield (
                key,
                f"{width}, a multiple of {ALIGNMENT} is needed",
                f"use {nearest_multiples(width, ALIGNMENT)}",
            )


@rule("each rank's experts are whole and share one tensor", f"{_EXPERTS}/experts.py")
def quack_experts(recipe: Recipe) -> Iterator[Found]:
    if not _is_quack(recipe):
        return
    parallel = recipe.parallel
    if parallel.expert_tensor > 1:
        yield "parallel.expert_tensor", f"ETP{parallel.expert_tensor} with quack", "write 1"
    if not recipe.kernels.grouped_gemm:
        yield "kernels.grouped_gemm", "false with quack", "write true"
    if parallel.data_sharding == "megatron_fsdp":
        yield "parallel.data_sharding", "megatron_fsdp with quack", "use distributed_optimizer"


@rule("every token has as many rows as it chose experts, weighted on their way out", f"{_EXPERTS}/rows.py")
def quack_rows(recipe: Recipe) -> Iterator[Found]:
    if not _is_quack(recipe):
        return
    if recipe.token_drop is not None:
        yield "token_drop", "a capacity with quack", "remove the block"
    if recipe.dispatch.apply_probs_on_input:
        yield "dispatch.apply_probs_on_input", "true with quack", "write false"


@rule("the activation is never kept, and made again in the gradient's epilogue", f"{_EXPERTS}/functions.py")
def quack_recompute(recipe: Recipe) -> Iterator[Found]:
    recompute = recipe.recompute
    if _is_quack(recipe) and recompute.granularity == "selective" and "moe_act" in recompute.modules:
        yield "recompute.modules", "moe_act with quack", "remove moe_act"


@rule("no code hands rows between parts of a layer that are called apart", f"{_EXPERTS}/moe_layer.py")
def quack_overlap(recipe: Recipe) -> Iterator[Found]:
    if _is_quack(recipe) and recipe.overlap.expert_parallel:
        yield "overlap.expert_parallel", "true with quack", "write false"


RULES = (
    quack_needs_a_gpu, quack_precision, quack_activation, quack_widths, quack_experts, quack_rows,
    quack_recompute, quack_overlap,
)  # fmt: skip


def _is_quack(recipe: Recipe) -> bool:
    return recipe.kernels.family == "quack" and recipe.model.moe is not None
