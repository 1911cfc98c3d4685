"""What quantisation-aware training asks of precision, kernels and layout (harness/quantize)."""

from __future__ import annotations

from collections.abc import Iterator

from moe_bench.spec.legality.rule import Found, rule
from moe_bench.spec.recipe import Recipe

_MODELOPT = "nvidia-modelopt 0.47, modelopt/torch/quantization"
_PLUGIN = f"{_MODELOPT}/plugins/megatron.py"
_LAYERS = "moe_bench/harness/quantize/layers.py"


@rule("what is rounded is multiplied in BF16 or FP32", f"{_PLUGIN}:458")
def quantized_precision(recipe: Recipe) -> Iterator[Found]:
    if recipe.quantization is not None and recipe.precision not in ("bf16", "fp32"):
        yield "precision", f"{recipe.precision} with quantization", "use bf16, or quantization: null"


@rule("it knows the layers of Megatron-Core and Transformer Engine, and our grouped experts", _LAYERS)
def quantized_kernels(recipe: Recipe) -> Iterator[Found]:
    if recipe.quantization is None:
        return
    if recipe.kernels.family == "quack":
        yield "kernels.family", "quack with quantization", "use torch_native"
    if recipe.kernels.op_fuser:
        yield "kernels.op_fuser", "true with quantization", "write false"


@rule("its loop over experts takes no tensor ranks beside expert ranks", f"{_PLUGIN}:741")
def quantized_experts(recipe: Recipe) -> Iterator[Found]:
    has_experts = recipe.quantization is not None and recipe.model.moe is not None
    if has_experts and not recipe.kernels.grouped_gemm:
        yield "kernels.grouped_gemm", "false with quantization", "write true"


@rule("quantisers read weights where Megatron-FSDP has only its share of them", _LAYERS)
def quantized_sharding(recipe: Recipe) -> Iterator[Found]:
    if recipe.quantization is not None and recipe.parallel.data_sharding == "megatron_fsdp":
        yield "parallel.data_sharding", "megatron_fsdp with quantization", "use distributed_optimizer"


@rule("what is multiplied is a rounded copy, which has no gradient buffer", f"{_PLUGIN}:477")
def quantized_weight_gradients(recipe: Recipe) -> Iterator[Found]:
    if recipe.quantization is None:
        return
    if recipe.kernels.fusions.gradient_accumulation:
        yield "kernels.fusions.gradient_accumulation", "true with quantization", "write false"
    if recipe.overlap.delayed_wgrad:
        yield "overlap.delayed_wgrad", "true with quantization", "write false"


@rule("the rounded tokens stand between the experts' activation and their product", _LAYERS)
def quantized_recompute(recipe: Recipe) -> Iterator[Found]:
    is_ours = recipe.quantization is not None and recipe.kernels.is_torch_native
    if is_ours and "moe_act" in recipe.recompute.modules:
        yield "recompute.modules", "moe_act with quantization", "remove moe_act"


@rule(
    "a quantiser without tokens returns early, which a capture cannot",
    f"{_MODELOPT}/nn/modules/tensor_quantizer.py:1165",
)
def quantized_graphs(recipe: Recipe) -> Iterator[Found]:
    if recipe.quantization is not None and recipe.cuda_graphs.implementation != "none":
        captured = f"{recipe.cuda_graphs.implementation} with quantization"
        yield "cuda_graphs.implementation", captured, "write none"


RULES = (
    quantized_precision,
    quantized_kernels,
    quantized_experts,
    quantized_sharding,
    quantized_weight_gradients,
    quantized_recompute,
    quantized_graphs,
)
