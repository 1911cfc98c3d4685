"""What each number format asks of the GPU, the kernels, the widths and the optimizer."""

from __future__ import annotations

from collections.abc import Iterator

from moe_bench.spec.legality.rule import Found, nearest_multiples, rule
from moe_bench.spec.recipe import Recipe

_CONFIG = "megatron/core/transformer/transformer_config.py"
_OPTIMIZER = "megatron/core/optimizer/optimizer_config.py"
_TE = "Transformer Engine 2.20"
_TORCH = "torch 2.15, aten/src/ATen/native/cuda"

ALIGNMENT = {
    "fp8_delayed": 16,
    "fp8_tensorwise": 16,
    "fp8_rowwise": 16,
    "fp8_blockwise": 16,
    "mxfp8": 32,
    "nvfp4": 16,
}
"""Elements to which every side of a matrix product is aligned: Transformer Engine's assert_dim_for_fp8_exec,
and the block in is_quantizable of its MXFP8Quantizer and NVFP4Quantizer; torch's scaled_grouped_mm."""


@rule("its block scaling is in the tensor cores of Blackwell alone", f"{_TE}, pytorch/quantization.py")
def format_of_the_gpu(recipe: Recipe) -> Iterator[Found]:
    gpu = recipe.system.gpu
    if recipe.precision in ("mxfp8", "nvfp4") and gpu is not None and gpu.architecture != "blackwell":
        yield (
            "precision",
            f"{recipe.precision} on {recipe.system.key}, a {gpu.architecture} GPU",
            "use fp8_blockwise, fp8_tensorwise or bf16",
        )


@rule("FP8 and FP4 products run in tensor cores", f"{_TE}, pytorch/quantization.py")
def format_needs_a_gpu(recipe: Recipe) -> Iterator[Found]:
    if recipe.precision in ALIGNMENT and recipe.system.gpu is None:
        yield "precision", f"{recipe.precision} on {recipe.system.key}, which has no GPU", "use bf16"


@rule(
    "but for scales per row, only Transformer Engine quantizes",
    "megatron/core/transformer/moe/experts.py:305",
)
def format_needs_transformer_engine(recipe: Recipe) -> Iterator[Found]:
    if _is_of_transformer_engine(recipe) and recipe.kernels.family != "transformer_engine":
        yield (
            "kernels.family",
            f"{recipe.kernels.family} with {recipe.precision}",
            "use transformer_engine, or precision bf16",
        )


@rule("Transformer Engine has no recipe with scales per row", f"{_TE}, common/recipe/__init__.py")
def rowwise_kernels(recipe: Recipe) -> Iterator[Found]:
    if recipe.precision == "fp8_rowwise" and recipe.kernels.family != "torch_native":
        yield "kernels.family", f"{recipe.kernels.family} with fp8_rowwise", "use torch_native, or bf16"


@rule(
    "torch compiles its grouped product with scales per row for compute capability 9.0 alone",
    f"{_TORCH}/ScaledGroupMM.cu",
)
def rowwise_of_the_gpu(recipe: Recipe) -> Iterator[Found]:
    gpu = recipe.system.gpu
    if recipe.precision == "fp8_rowwise" and gpu is not None and gpu.architecture != "hopper":
        yield "precision", f"fp8_rowwise on {recipe.system.key}, a {gpu.architecture} GPU", "use bf16"


@rule(
    "what is quantized row by row are the grouped products of the experts",
    "moe_bench/harness/kernels/fp8_grouped.py",
)
def rowwise_products(recipe: Recipe) -> Iterator[Found]:
    if recipe.precision != "fp8_rowwise":
        return
    if recipe.model.moe is None:
        yield "precision", "fp8_rowwise on a model without experts", "use bf16"
    elif not recipe.kernels.grouped_gemm:
        yield "kernels.grouped_gemm", "false with fp8_rowwise", "write true"


@rule("they are options of Transformer Engine's FP8 and FP4", f"{_CONFIG}:1440", f"{_CONFIG}:2318")
def low_precision_options(recipe: Recipe) -> Iterator[Found]:
    if not _is_of_transformer_engine(recipe) and recipe.low_precision is not None:
        yield "low_precision", f"a block with precision {recipe.precision}", "remove it"


@rule(
    "every side of a quantized product is aligned",
    f"{_TE}, pytorch/utils.py:assert_dim_for_fp8_exec",
    f"{_TORCH}/GroupedBlas.cpp",
)
def aligned_widths(recipe: Recipe) -> Iterator[Found]:
    unit = ALIGNMENT.get(recipe.precision)
    if unit is None:
        return
    for key, what, width in _quantized_widths(recipe):
        if width % unit:
            yield (
                key,
                f"{what} = {width}, {recipe.precision} takes multiples of {unit}",
                f"make it {nearest_multiples(width, unit)}, or use bf16",
            )


@rule(
    "primary weights in low precision exist as shards of the distributed optimizer",
    "megatron/training/arguments.py:1061",
)
def param_gather_shards(recipe: Recipe) -> Iterator[Found]:
    low = recipe.low_precision
    if low is not None and low.param_gather and recipe.parallel.data_sharding == "none":
        yield "low_precision.param_gather", "true with data_sharding none", "use distributed_optimizer"


@rule(
    "the gradient buffer is lent to gathered MXFP8 weights",
    "megatron/core/distributed/distributed_data_parallel_config.py:254",
    f"{_OPTIMIZER}:425",
)
def reuse_grad_buffer(recipe: Recipe) -> Iterator[Found]:
    low, key = recipe.low_precision, "low_precision.reuse_grad_buffer"
    if low is None or not low.reuse_grad_buffer:
        return
    if recipe.precision != "mxfp8" or not low.param_gather:
        gathered = "with" if low.param_gather else "without"
        yield key, f"true in {recipe.precision} {gathered} param_gather", "write false"
    elif recipe.overlap.param_gather_with_optimizer_step:
        yield key, "true with overlap.param_gather_with_optimizer_step", "write false"


@rule(
    "BF16 layers at the ends fit their pipeline rank",
    f"{_CONFIG}:1416",
    f"{_CONFIG}:1425",
)
def bf16_layers(recipe: Recipe) -> Iterator[Found]:
    low = recipe.low_precision
    if low is None or recipe.precision not in ALIGNMENT or recipe.precision == "nvfp4":
        return
    limit = recipe.model.num_layers // recipe.parallel.pipeline
    for name in ("num_first_layers_bf16", "num_last_layers_bf16"):
        wanted = getattr(low, name)
        if wanted > limit:
            yield (
                f"low_precision.{name}",
                f"{wanted}, {limit} layers per pipeline rank",
                f"use at most {limit}",
            )


@rule("delayed scaling keeps its history in every layer", f"{_CONFIG}:1403")
def bf16_layers_with_delayed_scaling(recipe: Recipe) -> Iterator[Found]:
    low = recipe.low_precision
    if low is None or recipe.precision != "fp8_delayed":
        return
    if low.num_first_layers_bf16 or low.num_last_layers_bf16:
        key = "num_first_layers_bf16" if low.num_first_layers_bf16 else "num_last_layers_bf16"
        yield f"low_precision.{key}", "BF16 layers with fp8_delayed", "write 0, or use fp8_tensorwise"


@rule("quantized attention is Transformer Engine's FP8", f"{_TE}, pytorch/attention")
def quantized_attention(recipe: Recipe) -> Iterator[Found]:
    low = recipe.low_precision
    if low is not None and low.attention and recipe.precision == "nvfp4":
        yield "low_precision.attention", "true with nvfp4", "write false"


@rule(
    "optimizer states below FP32 are Adam's, in shards",
    f"{_OPTIMIZER}:431",
    f"{_OPTIMIZER}:434",
)
def low_precision_states(recipe: Recipe) -> Iterator[Found]:
    optimizer = recipe.optimizer
    if not optimizer.is_precision_aware and recipe.offload.optimizer_fraction == 0:
        return
    if optimizer.name != "adam":
        yield "optimizer.name", f"{optimizer.name} with states below FP32, or offloaded", "use adam"
    elif recipe.parallel.data_sharding == "none":
        yield (
            "parallel.data_sharding",
            "none with optimizer states below FP32, or offloaded",
            "use distributed_optimizer",
        )


@rule(
    "without Transformer Engine, states are FP32 or BF16 and weights FP32",
    "moe_bench/harness/kernels/adam.py",
)
def torch_native_states(recipe: Recipe) -> Iterator[Found]:
    optimizer = recipe.optimizer
    if recipe.kernels.family == "transformer_engine":
        return
    if recipe.offload.optimizer_fraction:
        yield "offload.optimizer_fraction", f"set with {recipe.kernels.family}", "write 0"
    if optimizer.is_precision_aware and recipe.parallel.data_sharding == "megatron_fsdp":
        yield "optimizer", "states below FP32 with megatron_fsdp", "keep them in fp32"
    for name in ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
        dtype = getattr(optimizer, name)
        allowed = ("fp32",) if name == "main_params_dtype" else ("fp32", "bf16")
        if dtype not in allowed:
            yield f"optimizer.{name}", f"{dtype} with {recipe.kernels.family}", f"use {' or '.join(allowed)}"


@rule(
    "weights and gradients of an FP32 model are FP32",
    "megatron/core/distributed/param_and_grad_buffer.py:917",
)
def fp32_gradients(recipe: Recipe) -> Iterator[Found]:
    if recipe.precision == "fp32" and recipe.optimizer.gradient_dtype != "fp32":
        yield (
            "optimizer.gradient_dtype",
            f"{recipe.optimizer.gradient_dtype} with precision fp32",
            "write fp32",
        )


RULES = (
    format_of_the_gpu, format_needs_a_gpu, format_needs_transformer_engine, rowwise_kernels,
    rowwise_of_the_gpu, rowwise_products, low_precision_options, aligned_widths, param_gather_shards,
    reuse_grad_buffer, bf16_layers, bf16_layers_with_delayed_scaling, quantized_attention,
    low_precision_states, torch_native_states, fp32_gradients,
)  # fmt: skip


def _is_of_transformer_engine(recipe: Recipe) -> bool:
    """Whether the format is one of Transformer Engine's; the one with scales per row is torch's."""
    return recipe.precision in ALIGNMENT and recipe.precision != "fp8_rowwise"


def _quantized_widths(recipe: Recipe) -> Iterator[tuple[str, str, int]]:
    """Key, name and size of every side of the products that are quantized, on one rank.

    Scales per row are the experts' alone, whose number of tokens does not matter (GroupMMCommon.cuh).
    """
    model, parallel = recipe.model, recipe.parallel
    yield "model.hidden_size", "hidden_size", model.hidden_size
    if _is_of_transformer_engine(recipe):
        yield from _dense_widths(recipe)
    if model.moe is not None:
        expert_tensor = parallel.expert_tensor
        width = model.moe.expert_ffn_hidden_size // expert_tensor
        yield "parallel.expert_tensor", f"expert FFN width over ETP{expert_tensor}", width


def _dense_widths(recipe: Recipe) -> Iterator[tuple[str, str, int]]:
    """The same outside of the routed experts."""
    model, parallel = recipe.model, recipe.parallel
    tensor, attention = parallel.tensor, model.attention
    tokens = recipe.micro_batch_size * recipe.seq_len // parallel.context
    yield "seq_len", f"tokens of a micro batch over CP{parallel.context}", tokens
    if attention.kind == "gqa":
        width = (attention.num_heads + 2 * attention.num_query_groups) * attention.head_dim
        yield "parallel.tensor", f"QKV width over TP{tensor}", width // tensor
        out = attention.num_heads * attention.head_dim
    else:
        if attention.q_lora_rank is not None:
            yield "model.attention.q_lora_rank", "q_lora_rank", attention.q_lora_rank
        latent = attention.kv_lora_rank + attention.qk_rope_head_dim
        yield "model.attention.kv_lora_rank", "kv_lora_rank + qk_rope_head_dim", latent
        out = attention.num_heads * attention.v_head_dim
    yield "parallel.tensor", f"attention output width over TP{tensor}", out // tensor
    if model.dense_ffn_hidden_size is not None and model.num_dense_layers:
        yield "parallel.tensor", f"dense FFN width over TP{tensor}", model.dense_ffn_hidden_size // tensor
    shared = model.moe.shared_expert_ffn_hidden_size if model.moe is not None else 0
    if shared:
        yield "parallel.tensor", f"shared expert FFN width over TP{tensor}", shared // tensor
