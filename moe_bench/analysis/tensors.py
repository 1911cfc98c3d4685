"""The parameter tensors of one model chunk on one rank, in Megatron-Core's order, and the buckets they fill.

Where `params.py` counts parts of the model, this lists what the data-parallel buffers are made of: padding
and division into buckets follow from single tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from moe_bench.analysis.params import (
    compressed_attention_params,
    has_query_input_norm,
    indexer_params,
    key_width_of_head,
    stream_mixing_params,
    stream_sum_params,
)
from moe_bench.spec.mixer import (
    Attention,
    CompressedAttention,
    GatedDeltaNet,
    GroupedQueryAttention,
    Mamba2,
    MultiLatentAttention,
)
from moe_bench.spec.model import LayerStructure, MixtureOfExperts
from moe_bench.spec.pipeline import Chunk
from moe_bench.spec.recipe import Recipe

PARAM_ALIGNMENT = 64
BUCKET_ALIGNMENT = 128
"""Elements; optimizer/param_layout.py, pad_param_start and bucket_end_divisor."""
MIN_BUCKET_ELEMENTS = 40_000_000
MIN_BUCKET_ELEMENTS_PER_RANK = 1_000_000
"""distributed/distributed_data_parallel.py, __init__."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One parameter as one rank holds it."""

    name: str
    """The last part of Megatron-Core's name, or the last two."""
    num_elements: int
    num_columns: int = 1
    """Elements of a matrix's row, which Megatron-FSDP never divides; 1 for a vector."""
    is_expert: bool = False
    """Whether it is a routed expert's."""
    in_expert_group: bool = False
    """Whether its gradient is reduced over the expert-data-parallel group, not the data-parallel one."""
    sums_over_tensor: bool = False
    """Whether its gradient is summed over the tensor-parallel group, whose ranks have seen other tokens."""
    is_quantized: bool = False
    """Whether it is stored in FP8 or FP4 where primary weights are (`low_precision.param_gather`)."""
    has_own_bucket: bool = False
    """Whether it is one of several copies of the embedding, whose gradients are summed afterwards."""


def chunk_tensors(recipe: Recipe, chunk: Chunk) -> tuple[Tensor, ...]:
    """Parameters of one chunk on one rank, in the order in which GPTModel registers them.

    The order is that of the torch-native kernels. Transformer Engine's differ in where a norm stands and keep
    experts apart, one tensor each, which is told apart here; with Megatron-FSDP ours are apart as well.
    """
    return tuple(tensor for part in _parts(recipe, chunk) for tensor in part.tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Consecutive parameters of a chunk."""

    tensors: tuple[Tensor, ...]
    is_layer: bool = False
    """Whether they are a transformer layer, in the decoder or inside a multi-token prediction layer."""


def chunk_parts(recipe: Recipe, chunk: Chunk) -> tuple[Part, ...]:
    """The same tensors, layer by layer."""
    return tuple(_parts(recipe, chunk))


def _parts(recipe: Recipe, chunk: Chunk) -> Iterator[Part]:
    model, trains_mtp = recipe.model, recipe.num_mtp_layers > 0
    hidden = model.hidden_size
    vocabulary = _weight("word_embeddings.weight", model.vocab_size // recipe.parallel.tensor, hidden)
    vocabulary = replace(vocabulary, is_quantized=False)
    is_copied = recipe.parallel.pipeline > 1 and (model.tied_embeddings or trains_mtp)
    if chunk.has_embedding or chunk.num_mtp_layers:
        embeddings = [replace(vocabulary, has_own_bucket=is_copied)]
        if model.learned_positions:
            num_rows = model.max_position_embeddings
            positions = _weight("position_embeddings.weight", num_rows, hidden)
            embeddings.append(replace(positions, is_quantized=False))
        yield Part(tensors=tuple(embeddings))
    for layer in chunk.layers:
        yield _layer(recipe, model.layer(layer))
    if (model.num_layers - 1 in chunk.layers) if trains_mtp else chunk.has_loss:
        yield _final_norm(recipe)
    for _ in range(model.num_mtp_modules(chunk.num_mtp_layers)):
        yield from _mtp(recipe)
    if chunk.has_loss and not (model.tied_embeddings and chunk.has_embedding):
        is_copy = is_copied and model.tied_embeddings and not chunk.num_mtp_layers
        yield Part(tensors=(replace(vocabulary, name="output_layer.weight", has_own_bucket=is_copy),))


def _final_norm(recipe: Recipe) -> Part:
    """The norm behind the last layer of the decoder or of an MTP module, and what sums residual streams."""
    model = recipe.model
    norm = _norm(recipe, "final_layernorm", model.hidden_size)
    elements = stream_sum_params(hidden=model.hidden_size, num_streams=model.num_residual_streams)
    return Part(tensors=(*norm, *_whole(recipe, "hyper_connection_head", elements)))


def _layer(recipe: Recipe, structure: LayerStructure) -> Part:
    return Part(tensors=tuple(_layer_tensors(recipe, structure)), is_layer=True)


def _layer_tensors(recipe: Recipe, structure: LayerStructure) -> Iterator[Tensor]:
    """A norm before each half, then the half; with several residual streams, the maps around it."""
    recipe = recipe.at(structure)
    model = recipe.model
    number = model.num_residual_streams
    maps = stream_mixing_params(hidden=model.hidden_size, num_streams=number) if number > 1 else 0
    if structure.mixer is not None:
        yield from _whole(recipe, "self_attention_hyper_connection", maps)
        yield from _norm(recipe, "input_layernorm", model.hidden_size)
        yield from _mixer(recipe, structure)
    if structure.ffn is not None:
        yield from _whole(recipe, "mlp_hyper_connection", maps)
        yield from _norm(recipe, "pre_mlp_layernorm", model.hidden_size)
    if structure.ffn == "dense":
        yield from _mlp(recipe, "mlp", ffn=model.dense_ffn_hidden_size or 0, has_bias=model.linear_bias)
    elif structure.ffn == "moe" and model.moe is not None:
        yield from _experts(recipe, model.moe)


def _mixer(recipe: Recipe, structure: LayerStructure) -> Iterator[Tensor]:
    model = recipe.model
    if structure.mixer == "attention":
        yield from _attention(recipe, model.attention, structure)
    elif structure.mixer == "compressed_attention" and model.compressed_attention is not None:
        ratio = structure.compression_ratio or 0
        yield from _compressed_attention(recipe, model.compressed_attention, ratio=ratio)
    elif structure.mixer == "mamba" and model.mamba is not None:
        yield from _mamba(recipe, model.mamba)
    elif structure.mixer == "gated_delta_net" and model.gated_delta_net is not None:
        yield from _gated_delta_net(recipe, model.gated_delta_net)


def _mamba(recipe: Recipe, mamba: Mamba2) -> Iterator[Tensor]:
    """Megatron-Core's MambaMixer, which divides all of it over heads (ssm/mamba_mixer.py)."""
    hidden, tensor = recipe.model.hidden_size, recipe.parallel.tensor
    heads, inner, channels = (
        size // tensor for size in (mamba.num_heads, mamba.inner_width, mamba.conv_channels)
    )
    for name in ("dt_bias", "A_log", "D"):
        yield Tensor(name=name, num_elements=heads)
    yield _weight("in_proj.weight", inner + channels + heads, hidden)
    yield Tensor(name="conv1d.weight", num_elements=channels * mamba.conv_width)
    yield Tensor(name="conv1d.bias", num_elements=channels)
    yield Tensor(name="norm.weight", num_elements=inner)
    yield _weight("out_proj.weight", hidden, inner)


def _gated_delta_net(recipe: Recipe, net: GatedDeltaNet) -> Iterator[Tensor]:
    """Megatron-Core's GatedDeltaNet, whose ranks repeat the norm of a head (ssm/gated_delta_net.py)."""
    hidden, tensor = recipe.model.hidden_size, recipe.parallel.tensor
    keys, values, heads = (size // tensor for size in (net.key_width, net.value_width, net.num_value_heads))
    yield _weight("in_proj.weight", 2 * keys + 2 * values + 2 * heads, hidden)
    yield Tensor(name="conv1d.weight", num_elements=(2 * keys + values) * net.conv_width)
    for name in ("dt_bias", "A_log"):
        yield Tensor(name=name, num_elements=heads)
    yield from _norm(recipe, "out_norm", net.value_head_dim)
    yield _weight("out_proj.weight", hidden, values)


def _compressed_attention(recipe: Recipe, net: CompressedAttention, *, ratio: int) -> Iterator[Tensor]:
    """DeepSeek-V4's attention as one tensor: every rank repeats all of it (`compressed_attention_params`)."""
    attention = recipe.model.attention
    elements = compressed_attention_params(
        net,
        hidden=recipe.model.hidden_size,
        num_heads=attention.num_heads,
        head_dim=key_width_of_head(attention),
        ratio=ratio,
    ).total
    yield from _whole(recipe, "compressed_attention", elements)


def _attention(recipe: Recipe, attention: Attention, structure: LayerStructure) -> Iterator[Tensor]:
    if attention.kind == "mla":
        yield from _latent_attention(recipe, attention, has_indexer=structure.has_indexer)
    else:
        yield from _grouped_attention(recipe, attention)


def _latent_attention(
    recipe: Recipe, attention: MultiLatentAttention, *, has_indexer: bool
) -> Iterator[Tensor]:
    hidden, heads = recipe.model.hidden_size, attention.num_heads // recipe.parallel.tensor
    query = attention.qk_nope_head_dim + attention.qk_rope_head_dim
    yield _weight("linear_proj.weight", hidden, heads * attention.v_head_dim)
    if attention.q_lora_rank is None:
        if has_query_input_norm(attention, recipe.kernels.family):
            yield from _norm(recipe, "linear_q_proj.layer_norm", hidden)
        yield _weight("linear_q_proj.weight", heads * query, hidden)
    else:
        yield _repeated(recipe, "linear_q_down_proj.weight", attention.q_lora_rank, hidden)
        yield _weight("linear_q_up_proj.weight", heads * query, attention.q_lora_rank)
        yield from _norm(recipe, "q_layernorm", attention.q_lora_rank)
    latent = attention.kv_lora_rank
    keys = attention.qk_nope_head_dim + attention.v_head_dim
    yield _repeated(recipe, "linear_kv_down_proj.weight", latent + attention.qk_rope_head_dim, hidden)
    yield _weight("linear_kv_up_proj.weight", heads * keys, latent)
    yield from _norm(recipe, "kv_layernorm", latent)
    if attention.sparse is not None and has_indexer:
        q_rank = attention.q_lora_rank or hidden
        index = indexer_params(attention.sparse, hidden=hidden, q_rank=q_rank)
        yield from _whole(recipe, "indexer", index.total)


def _grouped_attention(recipe: Recipe, attention: GroupedQueryAttention) -> Iterator[Tensor]:
    hidden, tensor = recipe.model.hidden_size, recipe.parallel.tensor
    heads = attention.num_heads // tensor
    num_query_heads = attention.num_heads * (1 + attention.output_gate)
    qkv = attention.head_dim * (num_query_heads + 2 * attention.num_query_groups) // tensor
    if attention.sinks:
        yield Tensor(name="core_attention.softmax_offset", num_elements=heads)
    yield _weight("linear_proj.weight", hidden, heads * attention.head_dim)
    if recipe.model.linear_bias:
        yield _repeated(recipe, "linear_proj.bias", hidden)
    yield _weight("linear_qkv.weight", qkv, hidden)
    if attention.qkv_bias:
        yield Tensor(name="linear_qkv.bias", num_elements=qkv)
    if attention.qk_norm in ("per_head", "whole_vector"):
        is_whole = attention.qk_norm == "whole_vector"
        for name, num_heads in (
            ("q_layernorm", attention.num_heads),
            ("k_layernorm", attention.num_query_groups),
        ):
            # summed by name, with or without sequence parallelism (finalize_model_grads.py)
            num_gains = attention.head_dim * (num_heads if is_whole else 1)
            for norm in _norm(recipe, name, num_gains):
                yield replace(norm, sums_over_tensor=True)


def _router(recipe: Recipe, moe: MixtureOfExperts) -> Iterator[Tensor]:
    """The router and the projections around experts that work in a smaller width (moe/moe_layer.py)."""
    hidden = recipe.model.hidden_size
    yield _repeated(recipe, "router.weight", moe.num_experts, hidden)
    if recipe.model.router_bias:
        yield _repeated(recipe, "router.bias", moe.num_experts)
    if moe.latent_size is not None:
        yield _repeated(recipe, "fc1_latent_proj.weight", moe.latent_size, hidden)
        yield _repeated(recipe, "fc2_latent_proj.weight", hidden, moe.latent_size)


def _experts(recipe: Recipe, moe: MixtureOfExperts) -> Iterator[Tensor]:
    model, parallel = recipe.model, recipe.parallel
    yield from _router(recipe, moe)
    num_experts = moe.num_experts // parallel.expert
    ffn = moe.expert_ffn_hidden_size // parallel.expert_tensor
    width, first = model.expert_hidden_size, (1 + model.activation.is_gated) * ffn
    projections = [("linear_fc1", first, width), ("linear_fc2", width, ffn)]
    kinds = [("weight", True), ("bias", False)] if model.linear_bias else [("weight", True)]
    is_stacked = recipe.kernels.grouped_gemm and not (
        recipe.kernels.family == "transformer_engine" or parallel.data_sharding == "megatron_fsdp"
    )
    in_expert_group = uses_expert_groups(recipe)

    def tensors(names: Iterable[tuple[str, int, int]], count: int) -> Iterator[Tensor]:
        for name, outputs, inputs in names:
            for kind, is_matrix in kinds:
                for _ in range(1 if is_stacked else count):
                    size = outputs * inputs if is_matrix else outputs
                    yield Tensor(
                        name=f"{name}.{kind}",
                        num_elements=size * (count if is_stacked else 1),
                        num_columns=inputs if is_matrix else 1,
                        is_expert=True,
                        in_expert_group=in_expert_group,
                        is_quantized=is_matrix,
                    )

    if recipe.kernels.grouped_gemm:
        yield from tensors(projections, num_experts)
    else:
        for _ in range(num_experts):
            yield from tensors(projections, 1)
    if moe.shared_expert_ffn_hidden_size:
        if moe.shared_expert_gate:
            yield _repeated(recipe, "gate_weight", 1, model.hidden_size)
        ffn = moe.shared_expert_ffn_hidden_size
        yield from _mlp(recipe, "shared_experts", ffn=ffn, has_bias=model.linear_bias)
        if moe.shared_expert_mixing == "softmax":
            yield _repeated(recipe, "mixing.weight", 2, model.hidden_size)
            yield _repeated(recipe, "mixing.bias", 2)


def _mlp(recipe: Recipe, name: str, *, ffn: int, has_bias: bool) -> Iterator[Tensor]:
    hidden, ffn = recipe.model.hidden_size, ffn // recipe.parallel.tensor
    first = (1 + recipe.model.activation.is_gated) * ffn
    yield _weight(f"{name}.linear_fc1.weight", first, hidden)
    if has_bias:
        yield Tensor(name=f"{name}.linear_fc1.bias", num_elements=first)
    yield _weight(f"{name}.linear_fc2.weight", hidden, ffn)
    if has_bias:
        yield _repeated(recipe, f"{name}.linear_fc2.bias", hidden)


def _mtp(recipe: Recipe) -> Iterator[Part]:
    model = recipe.model
    hidden = model.hidden_size
    projection = _weight("eh_proj.weight", hidden // recipe.parallel.tensor, 2 * hidden)
    norms = (*_norm(recipe, "enorm", hidden), *_norm(recipe, "hnorm", hidden))
    yield Part(tensors=(*norms, projection))
    for structure in model.mtp_layers:
        yield _layer(recipe, structure)
    yield _final_norm(recipe)


def _weight(name: str, num_rows: int, num_columns: int) -> Tensor:
    return Tensor(name=name, num_elements=num_rows * num_columns, num_columns=num_columns, is_quantized=True)


def _norm(recipe: Recipe, name: str, num_gains: int) -> Iterator[Tensor]:
    """Gains, and offsets where the model has them."""
    for kind in ("weight", "bias")[: recipe.model.num_norm_vectors]:
        yield Tensor(
            name=f"{name}.{kind}",
            num_elements=num_gains,
            sums_over_tensor=recipe.parallel.sequence_parallel,
        )


def _repeated(recipe: Recipe, name: str, num_rows: int, num_columns: int = 1) -> Tensor:
    """A weight that every tensor-parallel rank holds whole and applies to its own tokens."""
    return Tensor(
        name=name,
        num_elements=num_rows * num_columns,
        num_columns=num_columns,
        sums_over_tensor=recipe.parallel.sequence_parallel,
        is_quantized="down_proj" in name,
    )


def _whole(recipe: Recipe, name: str, num_elements: int) -> Iterator[Tensor]:
    """Several weights as one tensor that every tensor-parallel rank repeats; nothing if there are none."""
    if num_elements:
        yield _repeated(recipe, name, num_elements)


def uses_expert_groups(recipe: Recipe) -> bool:
    """Whether experts have process groups of their own: EP > 1, or ETP other than TP (layers.py:961)."""
    parallel = recipe.parallel
    return parallel.expert > 1 or parallel.expert_tensor != parallel.tensor


def bucket_limit(recipe: Recipe, chunk: Chunk) -> int | None:
    """Elements from which on a bucket is full; None for one bucket per buffer.

    max(40 M, 1 M x DP) where gradients are reduced during the backward pass, for the first chunk of the first
    pipeline rank; the others have time enough (distributed_data_parallel.py, __init__).
    """
    is_first = chunk.pipeline_rank == 0 and chunk.virtual_stage == 0
    if not (is_first and recipe.overlap.grad_reduce):
        return None
    return max(MIN_BUCKET_ELEMENTS, MIN_BUCKET_ELEMENTS_PER_RANK * recipe.parallel.data)


def bucket_elements(
    tensors: Iterable[Tensor], *, num_shards: int, limit: int | None, is_padded: bool
) -> tuple[int, ...]:
    """Elements of each bucket of one buffer, filled from the last tensor to the first.

    With `is_padded` (distributed optimizer) each tensor starts at a multiple of 64 and each bucket ends at
    one of lcm(shards, 128) (optimizer/distrib_optimizer.py, _compute_per_buffer_param_layout).
    """
    buckets: list[int] = []
    start = end = 0
    bucket_end = math.lcm(num_shards, BUCKET_ALIGNMENT) if is_padded else 1
    for tensor in reversed(tuple(tensors)):
        if is_padded:
            end = _up(end, PARAM_ALIGNMENT)
            if tensor.has_own_bucket and end > start:
                end = _up(end, bucket_end)
                buckets.append(end - start)
                start = end
        end += tensor.num_elements
        is_full = limit is not None and end - start >= limit
        if is_full or (is_padded and tensor.has_own_bucket):
            end = _up(end, bucket_end)
            buckets.append(end - start)
            start = end
    if end > start:
        buckets.append(_up(end, bucket_end) - start)
    return tuple(buckets)


def _up(value: int, divisor: int) -> int:
    return -(-value // divisor) * divisor
