"""Bytes of the tensors that one layer works on, worked out once per recipe, and which kernels keep which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_bench.analysis.activations import activation_element_bytes, token_counts
from moe_bench.analysis.dispatch import dispatched_rows, expected_groups
from moe_bench.analysis.fsdp_memory import reduces_by_layer
from moe_bench.analysis.live_tensors import LiveTensors
from moe_bench.analysis.state_comms import gradient_bytes
from moe_bench.spec.model import MixtureOfExperts
from moe_bench.spec.recipe import Recipe, RecomputeModule

FP32_BYTES = 4
Weight = tuple[int, int]
"""Rows and columns of a product's weight on one rank."""
INDEX_BYTES = 4
"""An entry of a row map: int32 (transformer_engine pytorch/triton/permutation.py)."""
SORT_INDEX_BYTES = 8
"""An entry of torch's sort: int64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSizes:
    """What every layer of a recipe shares. t = tokens around norms, T = tokens inside attention and MLPs."""

    element_bytes: int
    gathered_tokens: int
    sharded_tokens: int
    hidden_size: int
    vector_bytes: int
    """a t H: a residual stream's tensor."""
    gathered_bytes: int
    """a T H: the same over the whole sequence of a tensor-parallel group."""
    is_split: bool
    """Whether a tensor-parallel group divides the sequence around the products."""
    weight_gradient_element_bytes: int
    """a; 0 where Transformer Engine's products add to the gradient buffer (`fusions.gradient_accumulation`)
    and hand over one placeholder again and again. Ours hand over a new one each."""
    reduced_gradient_element_bytes: int
    """g where Megatron-FSDP takes a buffer for the gradients of a layer's experts with the first of them, and
    0 where all gradients have their place from the start."""
    recomputes: frozenset[RecomputeModule]
    norms_are_separate: bool
    """Whether norms are modules of their own; Transformer Engine fuses them into the next projection, which
    keeps the normalised input whatever is recomputed."""
    positions_bytes: int
    """a S / CP: one number per position of the sequence that a rank holds."""
    has_bias: bool

    def recomputes_norm(self, *, is_fused: bool) -> bool:
        """Whether a norm's output is made again; one that is fused into a projection is kept by it."""
        return "layernorm" in self.recomputes and not is_fused

    def scatter(self, live: LiveTensors, whole: str, output: str) -> None:
        """A row-parallel product's output, `whole`, becomes this rank's share of the sequence, if divided."""
        if self.is_split:
            live.replace(whole, output, self.vector_bytes)
        else:
            live.rename(whole, output)

    def weight_gradient_bytes(self, weight: Weight, number: int = 1) -> int:
        """The gradient of one or several weights on its way to the gradient buffer."""
        return number * weight[0] * weight[1] * self.weight_gradient_element_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreSizes:
    """Core attention, whichever kind of attention is around it. n = heads per tensor-parallel rank."""

    queries_bytes: int
    keys_bytes: int
    values_bytes: int
    output_bytes: int
    """a T n d_v."""
    statistics_bytes: int
    """FP32 log-sum-exp, 4 T n; all scores, a T n S, where attention is not fused."""
    pads_values: bool
    """Whether values and output are padded to the keys' width for torch's flash kernel, and cut off again
    (harness/kernels/attention_kernels.py, flash_attention)."""
    has_sink: bool
    """Whether the output is scaled for a sink and kept before and after."""
    is_gated: bool
    """Whether the output is scaled by a gate, which a copy keeps, and kept before and after."""
    context_ranks: int
    """Ranks whose keys and values are gathered: CP with `context_comm: allgather`, else 1."""
    expands_keys: bool
    """Whether the kernel writes the gradients of keys and values per query head before it adds them up by
    group (flash_attn mha_bwd; TE's cuDNN kernels)."""
    copies_values: bool
    """Whether values are copied out of the product of queries, keys and values: Transformer Engine knows no
    layout whose values alone lie between others (dot_product_attention/utils.py, get_qkv_layout)."""
    copies_output: bool
    """Whether the output projection copies its input, which is not contiguous for several sequences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSizes:
    """Routed experts of one layer. R = rows that a rank sends; it receives `load` times as many."""

    num_local_experts: int
    scores_bytes: int
    """4 t E."""
    row_map_bytes: int
    """Which row goes where, and probabilities of rows (`_row_map_bytes`)."""
    dispatcher_lets_go: bool
    """Whether the dispatcher keeps nothing after a layer's forward pass (harness/kernels/fused)."""
    shares_logits: bool
    """Whether router and losses keep the logits alone, once (harness/kernels/fused/routing.py)."""
    sent_bytes: int
    """Rows as they are sent: a R H; DeepEP and HybridEP send a token once per rank."""
    received_bytes: int
    """Rows as they arrive: `load` times what was sent."""
    gathered_bytes: int
    """Rows as the experts read them, of all ETP ranks: a R load ETP H."""
    gathers_rows: bool
    """Whether ETP ranks gather each other's rows."""
    expert_rows: int
    """R load ETP."""
    ffn: int
    """F / ETP."""
    shared_ffn: int
    """F_s / TP, 0 without shared experts."""
    gemm_input_element_bytes: int
    """Of what the grouped products keep: 1 in FP8 and FP4, but with a scale per row, which keep BF16."""
    sorts_rows: bool
    """Whether rows are put in order of local experts after they arrive."""
    products_gather: bool
    """Whether the experts' products read rows where they arrived, in the order of local experts."""
    sends_rows: bool
    """Whether there is anybody to send to: EP above 1."""
    permutes: Literal["fused", "torch", "after", "never"]
    """How rows are copied per expert before they leave, that they are after they arrive, or not at all."""
    has_aux_loss: bool
    has_z_loss: bool


def layer_sizes(recipe: Recipe) -> LayerSizes:
    """Sizes of `recipe` on any of its ranks."""
    parallel, counts = recipe.parallel, token_counts(recipe)
    element = activation_element_bytes(recipe)
    recompute = recipe.recompute
    return LayerSizes(
        element_bytes=element,
        gathered_tokens=counts.gathered,
        sharded_tokens=counts.sharded,
        hidden_size=recipe.model.hidden_size,
        vector_bytes=element * counts.sharded * recipe.model.hidden_size,
        gathered_bytes=element * counts.gathered * recipe.model.hidden_size,
        is_split=counts.sharded != counts.gathered,
        weight_gradient_element_bytes=0 if _hands_over_placeholders(recipe) else element,
        reduced_gradient_element_bytes=gradient_bytes(recipe) if reduces_by_layer(recipe) else 0,
        recomputes=frozenset(recompute.modules if recompute.granularity == "selective" else ()),
        norms_are_separate=recipe.kernels.family != "transformer_engine",
        positions_bytes=element * recipe.seq_len // parallel.context,
        has_bias=recipe.model.linear_bias,
    )


def core_sizes(recipe: Recipe, sizes: LayerSizes) -> CoreSizes:
    """Sizes of core attention."""
    attention, parallel = recipe.model.attention, recipe.parallel
    heads = attention.num_heads // parallel.tensor
    per_channel = sizes.element_bytes * sizes.gathered_tokens
    statistics = FP32_BYTES * sizes.gathered_tokens * heads
    if recipe.kernels.attention == "unfused":
        statistics = per_channel * heads * recipe.seq_len
    gathers = parallel.context > 1 and parallel.context_comm == "allgather"
    is_torch = recipe.kernels.is_torch_native
    if attention.kind == "mla":
        qk_dim = attention.qk_nope_head_dim + attention.qk_rope_head_dim
        return CoreSizes(
            queries_bytes=per_channel * heads * qk_dim,
            keys_bytes=per_channel * heads * qk_dim,
            values_bytes=per_channel * heads * attention.v_head_dim,
            output_bytes=per_channel * heads * attention.v_head_dim,
            statistics_bytes=statistics,
            pads_values=is_torch and parallel.context == 1 and attention.v_head_dim < qk_dim,
            has_sink=False,
            is_gated=False,
            context_ranks=parallel.context if gathers else 1,
            expands_keys=False,
            copies_values=False,
            copies_output=False,
        )
    groups = attention.num_query_groups // parallel.tensor
    return CoreSizes(
        queries_bytes=per_channel * heads * attention.head_dim,
        keys_bytes=per_channel * groups * attention.head_dim,
        values_bytes=per_channel * groups * attention.head_dim,
        output_bytes=per_channel * heads * attention.head_dim,
        statistics_bytes=statistics,
        pads_values=False,
        has_sink=is_torch and attention.sinks,
        is_gated=attention.output_gate,
        context_ranks=parallel.context if gathers else 1,
        expands_keys=groups != heads,
        copies_values=recipe.kernels.family == "transformer_engine",
        copies_output=is_torch and recipe.micro_batch_size > 1,
    )


def expert_sizes(
    recipe: Recipe, moe: MixtureOfExperts, sizes: LayerSizes, *, load: float = 1.0
) -> ExpertSizes:
    """Sizes of the routed and shared experts of a rank that receives `load` times the mean.

    The all-to-all dispatcher permutes before it sends; DeepEP, HybridEP and the all-gather afterwards, which
    deliver a token to D ranks (`expected_groups`) or to all of them. quack's experts gather what arrives by
    all-to-all, and where nobody sends anything what the layer was given.
    """
    parallel = recipe.parallel
    element = sizes.element_bytes
    row_bytes = element * recipe.model.expert_hidden_size
    num_rows = dispatched_rows(recipe, moe)
    dispatcher, num_sent = recipe.dispatch.dispatcher, num_rows
    if dispatcher == "allgather":
        num_sent = sizes.sharded_tokens * parallel.expert * parallel.expert_tensor
    elif dispatcher != "alltoall":
        num_sent = round(sizes.sharded_tokens * expected_groups(recipe, moe, num_groups=parallel.expert))
    is_after = dispatcher != "alltoall"
    products_gather = recipe.kernels.family == "quack" and not is_after
    permutes: Literal["fused", "torch", "after", "never"]
    permutes = "fused" if recipe.kernels.fusions.permute else "torch"
    if products_gather and parallel.expert == 1:
        permutes = "never"
    num_received = num_sent if dispatcher == "allgather" else round(num_sent * load)
    num_expert_rows = round(num_rows * load) * parallel.expert_tensor
    num_local = moe.num_experts // parallel.expert
    return ExpertSizes(
        num_local_experts=num_local,
        scores_bytes=FP32_BYTES * sizes.sharded_tokens * moe.num_experts,
        row_map_bytes=_row_map_bytes(recipe, moe, sizes, permutes=permutes, num_rows=num_rows),
        dispatcher_lets_go=permutes_in_triton(recipe),
        shares_logits=recipe.kernels.fusions.router and recipe.kernels.family != "transformer_engine",
        sent_bytes=num_sent * row_bytes,
        received_bytes=num_received * row_bytes,
        gathered_bytes=num_expert_rows * row_bytes,
        gathers_rows=parallel.expert_tensor > 1 and dispatcher != "allgather",
        expert_rows=num_expert_rows,
        ffn=moe.expert_ffn_hidden_size // parallel.expert_tensor,
        shared_ffn=moe.shared_expert_ffn_hidden_size // parallel.tensor,
        gemm_input_element_bytes=element if recipe.precision in ("fp32", "bf16", "fp8_rowwise") else 1,
        sorts_rows=is_after or (_sorts_arrivals(recipe) and num_local > 1 and not products_gather),
        products_gather=products_gather,
        sends_rows=parallel.expert > 1,
        permutes="after" if is_after else permutes,
        has_aux_loss=moe.router.aux_loss != "none",
        has_z_loss=moe.router.z_loss_coefficient > 0,
    )


def _hands_over_placeholders(recipe: Recipe) -> bool:
    kernels = recipe.kernels
    return kernels.fusions.gradient_accumulation and kernels.family == "transformer_engine"


def permutes_in_triton(recipe: Recipe) -> bool:
    """Whether our own kernels permute (harness/kernels/fused/dispatchers.py)."""
    return (
        recipe.kernels.fusions.permute
        and recipe.kernels.family != "transformer_engine"
        and recipe.dispatch.dispatcher in ("alltoall", "allgather")
    )


def _sorts_arrivals(recipe: Recipe) -> bool:
    """Megatron-Core sorts what a rank has sent itself, too; our dispatcher does not."""
    return not permutes_in_triton(recipe) or recipe.parallel.expert * recipe.parallel.expert_tensor > 1


def _row_map_bytes(
    recipe: Recipe, moe: MixtureOfExperts, sizes: LayerSizes, *, permutes: str, num_rows: int
) -> int:
    """Row maps, orders of arrival and probabilities of R rows of t tokens.

    Transformer Engine: 4 t (2 E + 1), and 4 R each for orders and probabilities on both ways. Ours: 8 t S,
    where a token has at most S = min(k, experts permuted to) rows, and 4 R each for one order and the
    probabilities. torch's sort: 8 (t E + R).
    """
    if permutes == "never":
        return 2 * SORT_INDEX_BYTES * num_rows + 4 * INDEX_BYTES * num_rows
    if permutes == "torch":
        return SORT_INDEX_BYTES * (sizes.sharded_tokens * moe.num_experts + num_rows) + (
            4 * INDEX_BYTES * num_rows
        )
    if not permutes_in_triton(recipe):
        return INDEX_BYTES * sizes.sharded_tokens * (2 * moe.num_experts + 1) + 4 * INDEX_BYTES * num_rows
    tokens, experts, parallel = sizes.sharded_tokens, moe.num_experts, recipe.parallel
    if recipe.dispatch.dispatcher == "allgather":
        tokens, experts = tokens * parallel.expert * parallel.expert_tensor, experts // parallel.expert
    is_padded = recipe.token_drop is not None and recipe.token_drop.pad_to_capacity
    slots = experts if is_padded else min(moe.top_k, experts)
    return 2 * INDEX_BYTES * (tokens * slots + num_rows)
