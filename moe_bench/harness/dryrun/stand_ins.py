"""The kernels that a dry run does not launch: what stands in for each, what it keeps, and who says so.

One list per family. `verified` is true once the real kernel has been run under
`torch.autograd.graph.saved_tensors_hooks` on a GPU and kept the same bytes; until then every figure that
rests on the entry is marked. Only what a recipe uses is replaced: a fusion that is off runs as it is written.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moe_bench.analysis.activations import multiplies_experts_row_wise
from moe_bench.harness.dryrun import stand_in_kernels as kernels
from moe_bench.harness.dryrun.operator_flops import FlopKind
from moe_bench.harness.dryrun.quack_products import QuackProducts
from moe_bench.harness.dryrun.stand_in_kernels import OnFlops
from moe_bench.harness.substitution import Substitution, substituted
from moe_bench.spec.recipe import Recipe

Family = Literal["torch", "transformer_engine", "megatron", "quack"]
Replacements = Callable[[OnFlops], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StandIn:
    """One kernel, where the code calls it, and what takes its place."""

    kernel: str
    keeps: str
    """For the backward pass, beside its weights."""
    source: str
    """Where that was read."""
    module: str
    replacements: Replacements
    """New values of the module's attributes, or of a class's inside it."""
    used_by: Callable[[Recipe], bool]
    verified: bool = False


@contextlib.contextmanager
def stand_ins(recipe: Recipe, on_flops: OnFlops) -> Iterator[tuple[StandIn, ...]]:
    """Put every stand-in that a recipe needs in its place, and say which they are."""
    wanted = tuple(entry for family in STAND_INS.values() for entry in family if entry.used_by(recipe))
    with contextlib.ExitStack() as stack:
        for entry in wanted:
            owner = importlib.import_module(entry.module)
            for path, replacement in entry.replacements(on_flops).items():
                *outer, name = path.split(".")
                place = functools.reduce(getattr, outer, owner)
                stack.enter_context(substituted(Substitution(place, name, replacement)))
        yield wanted


def _fusion(name: str) -> Callable[[Recipe], bool]:
    """Whether `kernels.fusions` has this one on."""
    return lambda recipe: getattr(recipe.kernels.fusions, name) not in (False, "none")


def _fuses_experts(name: str) -> Callable[[Recipe], bool]:
    """Whether one of our Triton kernels is on, in a model with experts."""
    is_on = _fusion(name)
    return lambda recipe: recipe.model.moe is not None and is_on(recipe)


def _always(recipe: Recipe) -> bool:
    return True


def _needs_flex(recipe: Recipe) -> bool:
    """Whether some layer has a window, a sink or a divided sequence (kernels/attention.py)."""
    attention = recipe.model.attention
    has_more = attention.kind == "gqa" and (attention.sinks or attention.sliding_window is not None)
    return has_more or recipe.parallel.context > 1


def _is_plain_causal(recipe: Recipe) -> bool:
    return not _needs_flex(recipe)


def _compiles_activation(recipe: Recipe) -> bool:
    return recipe.model.moe is not None and not recipe.kernels.fusions.activation


def _has_bf16_moments(recipe: Recipe) -> bool:
    return recipe.optimizer.is_precision_aware


def _has_fp32_moments(recipe: Recipe) -> bool:
    return not recipe.optimizer.is_precision_aware


def _recomputes_parts(recipe: Recipe) -> bool:
    return recipe.recompute.granularity == "selective"


def _is_quack(recipe: Recipe) -> bool:
    return recipe.kernels.family == "quack" and recipe.model.moe is not None


def _balances_by_sinkhorn(recipe: Recipe) -> bool:
    return recipe.model.moe is not None and recipe.model.moe.router.choice == "sinkhorn"


def _is_fsdp(recipe: Recipe) -> bool:
    return recipe.parallel.data_sharding == "megatron_fsdp"


def _nothing(*args: object) -> None:
    del args


def _flash(on_flops: OnFlops) -> dict[str, Any]:
    def attend(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
        output: Tensor = kernels.Attention.apply(query, key, value, None, on_flops)
        return output

    return {"scaled_dot_product_attention": attend}


def _flex(on_flops: OnFlops) -> dict[str, Any]:
    def mask(query_positions: Tensor, key_positions: Tensor, window: int | None) -> int | None:
        # Our windows count the tokens before the query, the formula the query too.
        return None if window is None else window + 1

    def attend(
        query: Tensor, key: Tensor, value: Tensor, *, scale: float, mask: int | None, sink: Tensor | None
    ) -> Tensor:
        heads_first = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        output: Tensor = kernels.Attention.apply(*heads_first, mask, on_flops)
        if sink is not None:
            output = kernels.Sink.apply(output, sink)
        return output.permute(2, 0, 1, 3).flatten(2)

    return {"block_mask": mask, "blockwise_attention": attend}


def _rms_norm(on_flops: OnFlops) -> dict[str, Any]:
    def normalise(x: Tensor, shape: object, weight: Tensor, eps: float) -> Tensor:
        output: Tensor = kernels.RMSNorm.apply(x, weight)
        return output

    return {"rms_norm": normalise}


def _gated(on_flops: OnFlops) -> dict[str, Any]:
    def forward(x: Tensor, probabilities: Tensor, *numbers: object) -> Tensor:
        return x.new_empty(x.shape[0], x.shape[1] // (2 if numbers else 1))  # of a gate alone

    def backward(grad: Tensor, x: Tensor, probabilities: Tensor, *numbers: object) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(probabilities)

    return {f"{kind}_{way.__name__}": way for kind in ("gated", "gelu") for way in (forward, backward)}


def _row_wise(on_flops: OnFlops) -> dict[str, Any]:
    def quantize(x: Tensor, shape: tuple[int, ...]) -> Any:
        values = x.new_empty(shape, dtype=torch.float8_e4m3fn)
        return values, x.new_empty(shape[:-1], dtype=torch.float32)

    from moe_bench.harness.kernels.fp8_quantize import Quantized  # imports Triton

    def rows(x: Tensor) -> Any:
        return Quantized(*quantize(x, tuple(x.shape)))

    def columns(x: Tensor) -> Any:
        return Quantized(*quantize(x, (x.shape[0], x.shape[2], x.shape[1])))

    return {"quantize_rows": rows, "quantize_columns": columns}


def _adam(on_flops: OnFlops) -> dict[str, Any]:
    def update(params: list[Tensor], *states: object, **options: object) -> None:
        for param in params:
            param.add_(param)

    return {"adam": update, "_device_dtype_check_for_fused": _nothing}


def _low_precision_adam(on_flops: OnFlops) -> dict[str, Any]:
    def update(param: Tensor, grad: Tensor, master: Tensor, *states: object) -> None:
        param.copy_(master)

    return {"adam_update": update}


def _l2_norm(on_flops: OnFlops) -> dict[str, Any]:
    def norm(
        chunk: int, overflow: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool
    ) -> tuple[Tensor, Tensor]:
        grads = tensor_lists[0]
        return grads[0].new_empty(1, dtype=torch.float32), grads[0].new_empty(len(grads), dtype=torch.float32)

    return {"l2_norm_impl": norm}


def _no_kernels(*names: str) -> Replacements:
    """What is around our Triton kernels allocates and keeps; they alone are left out."""
    return lambda on_flops: {name: kernels.NoKernel() for name in names}


def _accumulated_weight_gradients(on_flops: OnFlops) -> dict[str, Any]:
    def accumulate(main_grad: Tensor, grad: Tensor, x: Tensor, offsets: Tensor) -> None:
        on_flops(FlopKind.GROUPED, 2 * grad.shape[0] * grad.shape[1] * x.shape[1])

    return {"accumulate_weight_gradient": accumulate}


def _rope(on_flops: OnFlops) -> dict[str, Any]:
    def rotate(x: Tensor, angles: Tensor, **options: object) -> Any:
        return kernels.Rope.apply(x, angles)

    return {"fused_apply_rotary_pos_emb": rotate}


def _cross_entropy(on_flops: OnFlops) -> dict[str, Any]:
    def loss(logits: Tensor, labels: Tensor, tp_group: Any, *options: object) -> Any:
        return kernels.CrossEntropy.apply(logits, labels, tp_group)

    return {"te_parallel_cross_entropy": loss}


def _swiglu(on_flops: OnFlops) -> dict[str, Any]:
    def forward(x: Tensor) -> Tensor:
        return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)

    def backward(grad: Tensor, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    return {"swiglu": forward, "swiglu_back": backward}


def _mla_rope(on_flops: OnFlops) -> dict[str, Any]:
    names = ("rotary_fwd_q_kernel", "rotary_bwd_q_kernel", "rotary_fwd_kv_kernel", "rotary_bwd_kv_kernel")
    return {name: kernels.NoKernel() for name in names}


def _share_storage(on_flops: OnFlops) -> dict[str, Any]:
    def share(output: Tensor, recomputed: Tensor) -> None:
        kept, source = output.untyped_storage(), recomputed.untyped_storage()
        num_bytes = source.nbytes()
        if num_bytes:  # 0 where another output of the same storage came first
            source.resize_(0)
            kept.resize_(num_bytes)

    return {"_get_share_storage": lambda: share}


def _uneven_shards(on_flops: OnFlops) -> dict[str, Any]:
    return {"update_uneven_dtensor_chunk_metadata": _nothing, "validate_uneven_dtensor": _nothing}


def _same_rng(on_flops: OnFlops) -> dict[str, Any]:
    return {"FullyShardedDataParallel.sync_rng_states_across_tp_group": _nothing}


def _quack_products(on_flops: OnFlops) -> dict[str, Any]:
    return {"interface": lambda: QuackProducts(on_flops)}


def _gather_sum(on_flops: OnFlops) -> dict[str, Any]:
    def add_up(rows: Tensor, row_of_slot: Tensor, weights: Tensor | None) -> Tensor:
        return rows.new_empty(row_of_slot.shape[0], rows.shape[1])

    return {"gather_sum": add_up}


def _no_package(on_flops: OnFlops) -> dict[str, Any]:
    return {"require_quack": _nothing}


_TORCH = (
    StandIn(
        kernel="flash attention",
        keeps="queries, keys, values (padded to the keys' width), output, FP32 log-sum-exp",
        source="torch 2.15 derivatives.yaml, _scaled_dot_product_flash_attention; gradients of keys and"
        " values per query head: aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_bwd",
        module="torch.nn.functional",
        replacements=_flash,
        used_by=_is_plain_causal,
    ),
    StandIn(
        kernel="flex attention (windows, sinks, context parallelism)",
        keeps="queries, keys, values, output, FP32 log-sum-exp; with sinks the output again",
        source="torch 2.15 torch/_higher_order_ops/flex_attention.py, FlexAttentionAutogradOp",
        module="moe_bench.harness.kernels.attention",
        replacements=_flex,
        used_by=_needs_flex,
    ),
    StandIn(
        kernel="RMSNorm",
        keeps="input, FP32 1 / rms per row",
        source="torch 2.15 derivatives.yaml, _fused_rms_norm",
        module="torch.nn.functional",
        replacements=_rms_norm,
        used_by=_always,
    ),
    StandIn(
        kernel="gated activation of the experts (compiled)",
        keeps="nothing beyond what moe_bench/harness/kernels/grouped_linear.py saves",
        source="moe_bench/harness/kernels/activation.py, one kernel each way when compiled",
        module="moe_bench.harness.kernels.activation",
        replacements=_gated,
        used_by=_compiles_activation,
    ),
    StandIn(
        kernel="quantization to FP8 with a scale per row (Triton)",
        keeps="nothing; FP8 copies and FP32 scales live through the product that they are made for",
        source="moe_bench/harness/kernels/fp8_quantize.py",
        module="moe_bench.harness.kernels.fp8_grouped",
        replacements=_row_wise,
        used_by=multiplies_experts_row_wise,
    ),
    StandIn(
        kernel="gated activation of the experts (Triton)",
        keeps="nothing beyond what moe_bench/harness/kernels/grouped_linear.py saves",
        source="moe_bench/harness/kernels/fused/activation.py",
        module="moe_bench.harness.kernels.fused.activation",
        replacements=_no_kernels("_forward_kernel", "_backward_kernel"),
        used_by=_fuses_experts("activation"),
    ),
    StandIn(
        kernel="weight gradients of the experts, added to the gradient buffer (Triton)",
        keeps="nothing beyond what moe_bench/harness/kernels/grouped_linear.py saves",
        source="moe_bench/harness/kernels/fused/weight_gradient.py",
        module="moe_bench.harness.kernels.fused.weight_gradient",
        replacements=_accumulated_weight_gradients,
        used_by=_fuses_experts("gradient_accumulation"),
    ),
    StandIn(
        kernel="row map of the permutation (Triton)",
        keeps="two int32 per token and expert that it may have",
        source="moe_bench/harness/kernels/fused/row_map.py",
        module="moe_bench.harness.kernels.fused.row_map",
        replacements=_no_kernels("_count_kernel", "_number_kernel"),
        used_by=_fuses_experts("permute"),
    ),
    StandIn(
        kernel="permutation of tokens (Triton)",
        keeps="the row map",
        source="moe_bench/harness/kernels/fused/permutation.py",
        module="moe_bench.harness.kernels.fused.permutation",
        replacements=_no_kernels("_spread_kernel", "_gather_kernel", "_probability_gradient_kernel"),
        used_by=_fuses_experts("permute"),
    ),
    StandIn(
        kernel="order of local experts (Triton)",
        keeps="an int32 per row",
        source="moe_bench/harness/kernels/fused/chunk_order.py",
        module="moe_bench.harness.kernels.fused.chunk_order",
        replacements=_no_kernels("_source_kernel", "_move_kernel"),
        used_by=_fuses_experts("permute"),
    ),
    StandIn(
        kernel="router (Triton)",
        keeps="logits, which router and balancing losses share, and the routing map",
        source="moe_bench/harness/kernels/fused/routing.py",
        module="moe_bench.harness.kernels.fused.routing",
        replacements=_no_kernels("_forward_kernel", "_backward_kernel"),
        used_by=_fuses_experts("router"),
    ),
    StandIn(
        kernel="Adam",
        keeps="nothing beyond its states; Transformer Engine's FusedAdam and torch's fused one work in place",
        source="transformer_engine 2.20.2 pytorch/optimizers/fused_adam.py; torch 2.15 torch/optim/adam.py",
        module="torch.optim.adam",
        replacements=_adam,
        used_by=_has_fp32_moments,
    ),
    StandIn(
        kernel="gradient norm over many tensors",
        keeps="nothing; Megatron-Core's replacement without Transformer Engine reads every norm back",
        source="transformer_engine 2.20.2 common/multi_tensor/l2norm.cu",
        module="megatron.core.optimizer.clip_grads",
        replacements=_l2_norm,
        used_by=_always,
    ),
    StandIn(
        kernel="Adam with low-precision moments (compiled)",
        keeps="nothing beyond its states",
        source="moe_bench/harness/kernels/adam.py, one kernel when compiled",
        module="moe_bench.harness.kernels.adam",
        replacements=_low_precision_adam,
        used_by=_has_bf16_moments,
    ),
)

_TRANSFORMER_ENGINE = (
    StandIn(
        kernel="rotary embedding",
        keeps="the angles, which all layers share",
        source="transformer_engine 2.20.2 pytorch/attention/rope.py, FusedRoPEFunc",
        module="megatron.core.models.common.embeddings.rope_utils",
        replacements=_rope,
        used_by=_fusion("rope"),
    ),
    StandIn(
        kernel="cross entropy",
        keeps="a copy of the logits, which becomes their gradient (2.16 overwrote the logits themselves)",
        source="transformer_engine 2.20.2 pytorch/triton/cross_entropy.py, cross_entropy_forward",
        module="megatron.core.models.common.language_module.language_module",
        replacements=_cross_entropy,
        used_by=_fusion("cross_entropy"),
    ),
)

_MEGATRON = (
    StandIn(
        kernel="SwiGLU of dense MLPs and shared experts (compiled)",
        keeps="nothing beyond what the autograd functions around it save",
        source="megatron-core 0.19.2 fusions/fused_bias_swiglu.py",
        module="megatron.core.fusions.fused_bias_swiglu",
        replacements=_swiglu,
        used_by=_fusion("activation"),
    ),
    StandIn(
        kernel="rotary embedding of multi-latent attention (Triton)",
        keeps="nothing beyond what the autograd functions around it save",
        source="megatron-core 0.19.2 fusions/fused_mla_yarn_rope_apply.py",
        module="megatron.core.fusions.fused_mla_yarn_rope_apply",
        replacements=_mla_rope,
        used_by=_fusion("rope"),
    ),
    StandIn(
        kernel="hand-over of recomputed storage (C++ extension)",
        keeps="nothing: the recomputed tensor's memory becomes the released one's",
        source="megatron-core 0.19.2 tensor_parallel/random.py:39, share_storage",
        module="megatron.core.tensor_parallel.random",
        replacements=_share_storage,
        used_by=_recomputes_parts,
    ),
    StandIn(
        kernel="rounds of Sinkhorn's algorithm, as many as the scores need",
        keeps="nothing; every round makes the tensors of the first",
        source="megatron-core 0.19.2 transformer/moe/moe_utils.py:178, sinkhorn",
        module="megatron.core.transformer.moe.router",
        replacements=lambda on_flops: {"sinkhorn": kernels.one_sinkhorn_round},
        used_by=_balances_by_sinkhorn,
    ),
    StandIn(
        kernel="offsets of Megatron-FSDP's shards in a checkpoint",
        keeps="nothing on the device; the other ranks' lengths differ from this one's, and nobody tells them",
        source="megatron-core 0.19.2 distributed/fsdp/src/megatron_fsdp/uneven_dtensor.py",
        module="megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer",
        replacements=_uneven_shards,
        used_by=_is_fsdp,
    ),
    StandIn(
        kernel="random states that Megatron-FSDP copies over the tensor-parallel ranks",
        keeps="nothing; nothing is drawn",
        source="megatron-core 0.19.2 distributed/fsdp/mcore_fsdp_adapter.py:474",
        module="megatron.core.distributed.fsdp.mcore_fsdp_adapter",
        replacements=_same_rng,
        used_by=_is_fsdp,
    ),
)

_QUACK = (
    StandIn(
        kernel="products over rows of varying number, with gathered inputs and gated epilogues",
        keeps="nothing beyond what moe_bench/harness/kernels/quack/functions.py saves",
        source="quack-kernels 0.6.5 quack/gemm_interface.py; one FP32 partial sum per row and tile of columns"
        " for the probabilities' gradient is left out",
        module="moe_bench.harness.kernels.quack.products",
        replacements=_quack_products,
        used_by=_is_quack,
    ),
    StandIn(
        kernel="sum of a token's gathered rows (Triton)",
        keeps="nothing beyond what moe_bench/harness/kernels/quack/functions.py saves",
        source="moe_bench/harness/kernels/quack/gather_sum_kernel.py",
        module="moe_bench.harness.kernels.quack.functions",
        replacements=_gather_sum,
        used_by=_is_quack,
    ),
    StandIn(
        kernel="presence of quack-kernels and of a GPU for it",
        keeps="nothing",
        source="moe_bench/harness/kernels/quack/experts.py, require_quack",
        module="moe_bench.harness.kernels.quack.experts",
        replacements=_no_package,
        used_by=_is_quack,
    ),
)

STAND_INS: Mapping[Family, tuple[StandIn, ...]] = {
    "torch": _TORCH,
    "transformer_engine": _TRANSFORMER_ENGINE,
    "megatron": _MEGATRON,
    "quack": _QUACK,
}
