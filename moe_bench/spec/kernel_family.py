"""A recipe on another family of kernels: what the family cannot have is replaced, everything else stays."""

from __future__ import annotations

from moe_bench.spec.legality.dispatch import FLEX
from moe_bench.spec.recipe import (
    CudaGraphs,
    Fusions,
    KernelFamily,
    KernelSpec,
    Offload,
    Precision,
    Recipe,
    Recompute,
)
from moe_bench.spec.scale import adam_with_plain_states

FAST_PATH = {"router": True, "permute": True, "activation": True, "gradient_accumulation": True}
"""Fusions that the torch-native family has as Triton kernels."""
_OWN_FUSIONS: dict[KernelFamily, dict[str, bool]] = {
    "torch_native": FAST_PATH,
    "quack": {"router": True, "permute": True, "activation": True},
}
"""What the families without Transformer Engine fuse; quack's products add weight gradients to the buffer
where a recipe asks for it.
"""
_OWN_PRECISIONS: dict[KernelFamily, tuple[Precision, ...]] = {
    "torch_native": ("fp32", "bf16", "fp8_rowwise"),
    "quack": ("bf16",),
}
"""What those families multiply in."""


def with_kernels(recipe: Recipe, family: KernelFamily) -> Recipe:
    """`recipe` with the kernels of `family`, and with whatever that rules out put to what is nearest.

    Another family than Transformer Engine multiplies in BF16 where it has not the recipe's precision, knows
    the states of `adam_with_plain_states`, gathers keys over context ranks, keeps everything on the device,
    and runs its fast path.
    """
    if family == recipe.kernels.family:
        return recipe
    if family == "transformer_engine":
        return recipe.model_copy(update={"kernels": recipe.kernels.model_copy(update={"family": family})})
    if family == "quack":
        recipe = _without_what_quack_lacks(recipe)
    precision: Precision = recipe.precision if recipe.precision in _OWN_PRECISIONS[family] else "bf16"
    parallel = recipe.parallel
    return recipe.model_copy(
        update={
            "precision": precision,
            "low_precision": recipe.low_precision if precision == recipe.precision else None,
            "kernels": KernelSpec(
                family=family,
                grouped_gemm=recipe.kernels.grouped_gemm,
                fusions=_fusions(recipe, family),
            ),
            "parallel": parallel.model_copy(
                update={"context_comm": "allgather" if parallel.context > 1 else parallel.context_comm}
            ),
            "overlap": recipe.overlap.model_copy(update={"delayed_wgrad": False, "tensor_parallel": False}),
            "cuda_graphs": CudaGraphs(),
            "offload": Offload(),
            "optimizer": adam_with_plain_states(recipe.optimizer),
            "mcore": {},
        }
    )


def _without_what_quack_lacks(recipe: Recipe) -> Recipe:
    """What its experts never keep is not recomputed, they share one weight, and their layer runs as one.

    Another activation, biases, expert tensor ranks and capacities stay, for `check` to refuse: a run without
    them would do other work.
    """
    recompute, parallel = recipe.recompute, recipe.parallel
    modules = tuple(module for module in recompute.modules if module != "moe_act")
    if recompute.granularity == "selective":
        recompute = recompute.model_copy(update={"modules": modules}) if modules else Recompute()
    is_fsdp = parallel.data_sharding == "megatron_fsdp"
    return recipe.model_copy(
        update={
            "recompute": recompute,
            "parallel": parallel.model_copy(
                update={"data_sharding": "distributed_optimizer" if is_fsdp else parallel.data_sharding}
            ),
            "overlap": recipe.overlap.model_copy(update={"expert_parallel": False}),
        }
    )


def _fusions(recipe: Recipe, family: KernelFamily) -> Fusions:
    """All that `family` has; weight gradients go to the buffer where it is whole and the product grouped, the
    router's kernel knows top-k alone, and the flex dispatcher permutes without ours.
    """
    moe = recipe.model.moe
    has_whole_buffer = recipe.parallel.data_sharding != "megatron_fsdp" and recipe.kernels.grouped_gemm
    is_possible = {
        "gradient_accumulation": has_whole_buffer,
        "router": moe is None or moe.router.choice == "top_k",
        "permute": recipe.dispatch.dispatcher not in FLEX,
    }
    own = {name: is_possible.get(name, True) for name in _OWN_FUSIONS[family]}
    return Fusions(
        cross_entropy="none" if recipe.kernels.fusions.cross_entropy == "none" else "native", **own
    )
