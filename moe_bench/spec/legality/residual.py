"""What GPT-2's parts and residual experts ask of a recipe: learned positions, LayerNorm, GELU, biases."""

from __future__ import annotations

from collections.abc import Iterator

from moe_bench.spec.legality.attention import heads, query_groups
from moe_bench.spec.legality.rule import Found, nearest_divisor, rule
from moe_bench.spec.recipe import Recipe

_EMBEDDING = "megatron/core/models/common/embeddings/language_model_embedding.py"
_CONFIG = "megatron/core/transformer/transformer_config.py"
_SHARED = "moe_bench/harness/kernels/shared_experts.py"


@rule("positions are rows of a table, and nothing else says where a token stands", f"{_EMBEDDING}:67")
def learned_positions(recipe: Recipe) -> Iterator[Found]:
    model = recipe.model
    if not model.learned_positions:
        return
    if recipe.seq_len > model.max_position_embeddings:
        what = f"{recipe.seq_len}, {model.max_position_embeddings} learned positions"
        yield "seq_len", what, f"use at most {model.max_position_embeddings}"
    if model.rope.rotary_fraction:
        what = f"{model.rope.rotary_fraction} with learned positions"
        yield "model.rope.rotary_fraction", what, "write 0.0"
    if recipe.num_mtp_layers:
        yield "num_mtp_layers", f"{recipe.num_mtp_layers} with learned positions", "write 0"


@rule("every tensor rank holds as many rows of the embedding", "megatron/core/tensor_parallel/utils.py:118")
def vocabulary(recipe: Recipe) -> Iterator[Found]:
    tensor, num_rows = recipe.parallel.tensor, recipe.model.vocab_size
    # a size that does not divide the heads is refused for that already
    if num_rows % tensor and not any((*heads.problems(recipe), *query_groups.problems(recipe))):
        fix = f"use {nearest_divisor(num_rows, tensor)}"
        yield "parallel.tensor", f"TP{tensor}, a vocabulary of {num_rows}", fix


@rule("GELU's tanh approximation is not among the fused activations", f"{_CONFIG}:2116")
def gelu(recipe: Recipe) -> Iterator[Found]:
    is_fused = recipe.kernels.fusions.activation and recipe.kernels.family != "quack"
    if recipe.model.activation.kind == "gelu" and is_fused:
        yield "kernels.fusions.activation", "true with gelu", "write false"


@rule("the fused norm has no mean and no offset", f"{_CONFIG}:2149")
def layer_norm(recipe: Recipe) -> Iterator[Found]:
    if recipe.model.normalization == "layernorm" and recipe.kernels.fusions.residual_norm:
        yield "kernels.fusions.residual_norm", "true with layernorm", "write false"


@rule(
    "a recomputed MLP hands its bias out of a checkpoint, whose backward pass calls itself without end",
    "megatron/core/transformer/transformer_layer.py:882",
)
def bias_and_recomputed_mlp(recipe: Recipe) -> Iterator[Found]:
    recompute, model = recipe.recompute, recipe.model
    if recompute.granularity != "selective" or "mlp" not in recompute.modules:
        return
    if model.linear_bias and model.num_dense_layers:
        yield "recompute.modules", "mlp with biases in dense layers", "leave mlp out"


@rule("shared experts with biases or weights of their own are ours, without gate, overlap or graphs", _SHARED)
def residual_experts(recipe: Recipe) -> Iterator[Found]:
    moe = recipe.model.moe
    if moe is None:
        return
    is_mixed = moe.shared_expert_mixing == "softmax"
    if not moe.shared_expert_ffn_hidden_size:
        if is_mixed:
            yield "model.moe.shared_expert_mixing", "softmax without shared experts", "write sum"
        return
    if not (is_mixed or recipe.model.linear_bias):
        return
    what = "a mixing softmax" if is_mixed else "biases in shared experts"
    asked = (
        (
            "kernels.family",
            recipe.kernels.family == "transformer_engine" or (is_mixed and recipe.kernels.family == "quack"),
            recipe.kernels.family,
            "torch_native",
        ),
        ("model.moe.shared_expert_gate", moe.shared_expert_gate, "true", "false"),
        ("overlap.shared_experts", recipe.overlap.shared_experts, "true", "false"),
        (
            "cuda_graphs.implementation",
            recipe.cuda_graphs.implementation != "none",
            recipe.cuda_graphs.implementation,
            "none",
        ),
    )
    for key, is_asked, value, fix in asked:
        if is_asked:
            yield key, f"{value} with {what}", f"write {fix}"


RULES = (learned_positions, vocabulary, gelu, layer_norm, bias_and_recomputed_mlp, residual_experts)
