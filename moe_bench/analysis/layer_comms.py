"""What the parts of a decoder layer, of an MTP module, and of the model's two ends carry per micro batch.

Tensor parallelism with sequence parallelism (arXiv:2205.05198, 4.2.2): a projection split by columns gathers
its input, T w a, and gathers it again backward for the weight gradient, where the input's gradient is
reduce-scattered; one split by rows reduce-scatters its output and gathers its gradient. Without sequence
parallelism both become all-reduces of the same size, backward and forward (tensor_parallel/layers.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moe_bench.analysis.activations import activation_element_bytes, token_counts
from moe_bench.analysis.collectives import Call, Collective, Exchange, Group
from moe_bench.analysis.dispatch import MOE, dispatch_exchanges
from moe_bench.spec.mixer import GroupedQueryAttention, MultiLatentAttention
from moe_bench.spec.model import MixtureOfExperts
from moe_bench.spec.recipe import Precision, Recipe, RecomputeModule

Modules = frozenset[RecomputeModule]
NONE: Modules = frozenset()
UP_PROJECTION: Modules = frozenset({"mla_up_proj"})
CORE: Modules = frozenset({"core_attn"})
DENSE_MLP: Modules = frozenset({"mlp"})
SHARED: Modules = MOE | {"shared_experts"}
GATHER, SCATTER, REDUCE = Collective.ALL_GATHER, Collective.REDUCE_SCATTER, Collective.ALL_REDUCE
TO_ALL, SEND, RECV = Collective.ALL_TO_ALL, Collective.SEND, Collective.RECV

FP32_BYTES = 4
COUNT_BYTES = 8
"""A number of tokens: int64."""
INDEX_BYTES = 8
"""A token's number in the vocabulary: int64."""

_QUANTIZED_BYTES: Mapping[Precision, float] = {
    "fp8_delayed": 1.0,
    "fp8_tensorwise": 1.0,
    "fp8_blockwise": 1 + 4 / 128,
    "mxfp8": 1 + 1 / 32,
    "nvfp4": 1 / 2 + 1 / 16,
}
"""Bytes of one element that Transformer Engine gathers already quantized, scales included
(TransformerEngine, pytorch/distributed.py gather_along_first_dim). Read, not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorParallel:
    """How activations of one layer travel over the tensor-parallel group."""

    num_rows: int
    """T, the tokens of a micro batch that all ranks of the group work on together."""
    element_bytes: int
    gathered_bytes: float
    """Bytes of an element on its way into a GEMM; less than `element_bytes` where it is quantized first."""
    sequence_parallel: bool

    def columns(self, width: int, what: str, repeated_by: Modules = NONE) -> Exchange:
        """A projection split by columns, from `width` channels."""
        gather = Call(GATHER, Group.TENSOR, round(self.num_rows * width * self.gathered_bytes), what)
        num_bytes = self.num_rows * width * self.element_bytes
        if not self.sequence_parallel:
            return Exchange(backward=(Call(REDUCE, Group.TENSOR, num_bytes, what),), repeated_by=repeated_by)
        scatter = Call(SCATTER, Group.TENSOR, num_bytes, what)
        return Exchange(forward=(gather,), backward=(gather, scatter), repeated_by=repeated_by)

    def rows(self, width: int, what: str, repeated_by: Modules = NONE) -> Exchange:
        """A projection split by rows, to `width` channels."""
        num_bytes = self.num_rows * width * self.element_bytes
        if not self.sequence_parallel:
            return Exchange(forward=(Call(REDUCE, Group.TENSOR, num_bytes, what),), repeated_by=repeated_by)
        gather = Call(GATHER, Group.TENSOR, round(self.num_rows * width * self.gathered_bytes), what)
        scatter = Call(SCATTER, Group.TENSOR, num_bytes, what)
        return Exchange(forward=(scatter,), backward=(gather,), repeated_by=repeated_by)

    def gathered(self, width: int, what: str, repeated_by: Modules = NONE) -> Exchange:
        """The sequence gathered and kept whole; its gradient is reduce-scattered."""
        num_bytes = self.num_rows * width * self.element_bytes
        forward, backward = (Call(op, Group.TENSOR, num_bytes, what) for op in (GATHER, SCATTER))
        return Exchange(forward=(forward,), backward=(backward,), repeated_by=repeated_by)


def tensor_parallel(recipe: Recipe, *, is_quantized: bool) -> TensorParallel:
    """The group's traffic around layers whose GEMMs run in FP8 or FP4 (`is_quantized`) or not."""
    element = activation_element_bytes(recipe)
    return TensorParallel(
        num_rows=token_counts(recipe).gathered,
        element_bytes=element,
        gathered_bytes=_QUANTIZED_BYTES[recipe.precision] if is_quantized else element,
        sequence_parallel=recipe.parallel.sequence_parallel,
    )


def runs_quantized(recipe: Recipe, layer: int | None) -> bool:
    """Whether the GEMMs of decoder layer `layer` (None: of an MTP module) run in FP8 or FP4.

    The first and last layers may stay BF16 (Megatron-Core's first_last_layers_bf16).
    """
    if recipe.precision not in _QUANTIZED_BYTES:
        return False
    low = recipe.low_precision
    if layer is None or low is None:
        return True
    return low.num_first_layers_bf16 <= layer < recipe.model.num_layers - low.num_last_layers_bf16


def layer_exchanges(recipe: Recipe, *, is_moe: bool, is_quantized: bool) -> tuple[Exchange, ...]:
    """One decoder layer, forward in order."""
    parallel = tensor_parallel(recipe, is_quantized=is_quantized)
    attention = attention_exchanges(recipe, parallel)
    moe = recipe.model.moe
    if is_moe and moe is not None:
        return (*attention, *expert_exchanges(recipe, moe, parallel))
    hidden = recipe.model.hidden_size
    return (
        *attention,
        parallel.columns(hidden, "MLP input", DENSE_MLP),
        parallel.rows(hidden, "MLP output", DENSE_MLP),
    )


def attention_exchanges(recipe: Recipe, parallel: TensorParallel) -> tuple[Exchange, ...]:
    """The attention half of a layer."""
    attention, hidden = recipe.model.attention, recipe.model.hidden_size
    if attention.kind == "mla":
        inputs = _latent_inputs(attention, hidden, parallel)
        qk_dim = attention.qk_nope_head_dim + attention.qk_rope_head_dim
        core = _context_exchanges(
            recipe,
            num_heads=attention.num_heads,
            num_groups=attention.num_heads,
            qk_dim=qk_dim,
            v_dim=attention.v_head_dim,
        )
    else:
        inputs = (parallel.columns(hidden, "attention input"), *_whole_vector_norms(attention, parallel))
        core = _context_exchanges(
            recipe,
            num_heads=attention.num_heads,
            num_groups=attention.num_query_groups,
            qk_dim=attention.head_dim,
            v_dim=attention.head_dim,
        )
    return (*inputs, *core, parallel.rows(hidden, "attention output"))


def _latent_inputs(
    attention: MultiLatentAttention, hidden: int, parallel: TensorParallel
) -> tuple[Exchange, ...]:
    """Latents of queries, T r_q a, and of keys and values, T r_kv a, gathered for their up-projections, and
    the rotary key, T d_r a. The down-projections are whole on every rank and move nothing.
    """
    query = (
        parallel.columns(hidden, "query input", UP_PROJECTION)
        if attention.q_lora_rank is None
        else parallel.columns(attention.q_lora_rank, "query latent", UP_PROJECTION)
    )
    inputs = (query, parallel.columns(attention.kv_lora_rank, "key-value latent", UP_PROJECTION))
    if not parallel.sequence_parallel:
        return inputs
    return (*inputs, parallel.gathered(attention.qk_rope_head_dim, "rotary key"))


def _whole_vector_norms(attention: GroupedQueryAttention, parallel: TensorParallel) -> tuple[Exchange, ...]:
    """OLMoE's norms see all heads: a sum of squares, 4 T, is all-reduced each way for queries and for keys
    (harness/kernels/norm.py).
    """
    if attention.qk_norm != "whole_vector":
        return ()
    call = Call(REDUCE, Group.TENSOR, FP32_BYTES * parallel.num_rows, "sum of squares")
    return (Exchange(forward=(call,), backward=(call,)),) * 2


def _context_exchanges(
    recipe: Recipe, *, num_heads: int, num_groups: int, qk_dim: int, v_dim: int
) -> tuple[Exchange, ...]:
    """Keys and values, K = T g (d_qk + d_v) a / TP, over the context-parallel group of C ranks.

    `allgather`, and the torch-native kernels always: C K gathered, C K of gradients reduce-scattered;
    Transformer Engine gathers again backward. `p2p`: C - 1 messages of K forward, C - 1 of keys and values
    and as many of their gradients backward. `a2a`: queries, keys, values and output change from a share of
    the tokens to a share of the heads. Source: TransformerEngine, context_parallel.py.
    """
    tensor, context = recipe.parallel.tensor, recipe.parallel.context
    scale = activation_element_bytes(recipe) * token_counts(recipe).gathered
    keys, values = (scale * num_groups * dim // tensor for dim in (qk_dim, v_dim))
    is_native = recipe.kernels.family != "transformer_engine"
    if is_native or recipe.parallel.context_comm == "allgather":
        pairs = ((keys, "keys"), (values, "values"))
        gathers = tuple(Call(GATHER, Group.CONTEXT, context * size, what) for size, what in pairs)
        scatters = tuple(Call(SCATTER, Group.CONTEXT, context * size, what) for size, what in pairs)
        backward = scatters if is_native else gathers + scatters
        return (Exchange(forward=gathers, backward=backward, repeated_by=CORE),)
    if recipe.parallel.context_comm == "p2p":
        forward = tuple(Call(op, Group.CONTEXT, keys + values, "keys and values") for op in (SEND, RECV)) * (
            context - 1
        )
        return (Exchange(forward=forward, backward=forward * 2, repeated_by=CORE),)
    queries, outputs = (scale * num_heads * dim // tensor for dim in (qk_dim, v_dim))
    sizes = ((queries, "queries"), (keys, "keys"), (values, "values"), (outputs, "attention output"))
    calls = tuple(Call(TO_ALL, Group.CONTEXT, size, what) for size, what in sizes)
    return (Exchange(forward=calls, backward=calls, repeated_by=CORE),)


def expert_exchanges(recipe: Recipe, moe: MixtureOfExperts, parallel: TensorParallel) -> tuple[Exchange, ...]:
    """The expert half of a layer: balancing loss, dispatch and combine, shared experts."""
    exchanges = [*_balancing_exchanges(recipe, moe), *dispatch_exchanges(recipe, moe)]
    if moe.shared_expert_ffn_hidden_size:
        hidden = recipe.model.hidden_size
        # run beside the dispatch, shared experts keep their gathered input (shared_experts.py)
        split = parallel.gathered if _overlaps_shared(recipe) else parallel.columns
        exchanges.append(split(hidden, "shared expert input", SHARED))
        exchanges.append(parallel.rows(hidden, "shared expert output", SHARED))
    return tuple(exchanges)


def _overlaps_shared(recipe: Recipe) -> bool:
    return recipe.overlap.shared_experts and recipe.parallel.sequence_parallel


def _balancing_exchanges(recipe: Recipe, moe: MixtureOfExperts) -> tuple[Exchange, ...]:
    """The balancing loss sums the tokens of each expert, 8 E, per sequence of the micro batch for
    `seq_aux_loss` (router.py, get_tokens_per_expert_and_token_count).
    """
    router = moe.router
    if router.aux_loss == "none" or not router.aux_loss_coefficient:
        return ()
    group = Group.TENSOR_DATA_CONTEXT if router.aux_loss == "global_aux_loss" else Group.TENSOR_CONTEXT
    num_sequences = recipe.micro_batch_size if router.aux_loss == "seq_aux_loss" else 1
    call = Call(REDUCE, group, COUNT_BYTES * moe.num_experts * num_sequences, "tokens per expert")
    return (Exchange(forward=(call,), repeated_by=MOE, needs_grad=True),)


def embedding_exchanges(recipe: Recipe) -> tuple[Exchange, ...]:
    """The input embedding, split over the vocabulary: like a projection split by rows.

    Where positions are added to it, it is summed whole before the sequence is split
    (language_model_embedding.py, reduce_scatter_embeddings).
    """
    parallel = tensor_parallel(recipe, is_quantized=False)
    rows = parallel.rows(recipe.model.hidden_size, "embedding")
    if not (recipe.model.learned_positions and parallel.sequence_parallel):
        return (rows,)
    whole = replace(parallel, sequence_parallel=False).rows(recipe.model.hidden_size, "embedding")
    return (replace(rows, forward=whole.forward),)


def loss_exchanges(recipe: Recipe) -> tuple[Exchange, ...]:
    """LM head and loss of every prediction: the last hidden states, T H a, and three numbers per token, 12 T.

    Maximum, target logit and sum of exponentials are all-reduced (tensor_parallel/cross_entropy.py), together
    or apart; Transformer Engine 2.20.2 gathers four numbers, 16 T TP (pytorch/triton/cross_entropy.py; three
    in older releases). For each MTP module Megatron-Core counts how often its best token is right, and
    gathers each rank's best logit, a T TP, and its index, 8 T TP (multi_token_prediction.py).
    """
    parallel = tensor_parallel(recipe, is_quantized=False)
    number = FP32_BYTES * parallel.num_rows
    calls: tuple[Call, ...]
    if recipe.kernels.fusions.cross_entropy == "te":
        calls = (Call(GATHER, Group.TENSOR, 4 * number * recipe.parallel.tensor, "loss"),)
    else:
        parts = (1, 2) if recipe.kernels.fusions.cross_entropy == "native" else (1, 1, 1)
        calls = tuple(Call(REDUCE, Group.TENSOR, number * part, "loss") for part in parts)
    one = (parallel.columns(recipe.model.hidden_size, "LM head input"), Exchange(forward=calls))
    rows = parallel.num_rows * recipe.parallel.tensor
    guess = tuple(
        Call(GATHER, Group.TENSOR, rows * size, "best token")
        for size in (parallel.element_bytes, INDEX_BYTES)
    )
    return one + (*one, Exchange(forward=guess)) * recipe.num_mtp_layers


def mtp_exchanges(recipe: Recipe, *, is_moe: bool) -> tuple[Exchange, ...]:
    """One MTP module without its embedding and loss: the projection of 2 H channels and a decoder layer.

    The projection's output is gathered over channels, T H a, and cut into sequences again
    (multi_token_prediction.py, _concat_embeddings).
    """
    is_quantized = runs_quantized(recipe, None)
    parallel = tensor_parallel(recipe, is_quantized=is_quantized)
    hidden = recipe.model.hidden_size
    whole = Call(GATHER, Group.TENSOR, parallel.num_rows * hidden * parallel.element_bytes, "MTP projection")
    backward = (whole,) if parallel.sequence_parallel else ()
    return (
        parallel.columns(2 * hidden, "MTP input"),
        Exchange(forward=(whole,), backward=backward),
        *layer_exchanges(recipe, is_moe=is_moe, is_quantized=is_quantized),
    )
