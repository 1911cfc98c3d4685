"""Device memory of a step under torch's fully_shard, as torchtitan and NeMo Automodel train, in closed form.

pytorch/torchtitan 9dec370 (2024-12) and 5b5d468 (2025-09): parallelisms/parallelize_llama.py,
distributed/activation_checkpoint.py, models/deepseek_v3/infra/parallelize.py; NVIDIA-NeMo/Automodel 77f1123:
components/moe/parallelizer.py, components/loss/masked_ce.py; torch distributed/fsdp/_fully_shard. What a
layer holds while it runs is the closed form's for Megatron-Core, and what torch's tensor and context
parallelism add.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from moe_bench.analysis.activations import activation_element_bytes, token_counts
from moe_bench.analysis.chunk_memory import ModelMemory
from moe_bench.analysis.params import Part, RankParams, rank_params, rank_weights
from moe_bench.projection.rows.torch_kept import operator_checkpoint_bytes, value_dim
from moe_bench.projection.rows.torch_stages import (
    StagePolicy,
    chunks_in_flight,
    chunks_with_gradients,
    stage_bytes,
)
from moe_bench.spec.recipe import Recipe, Recompute

_BF16_BYTES, _FP32_BYTES = 2, 4
_OUTSIDE = (Part.INPUT_EMBEDDING, Part.LM_HEAD)


class Checkpointing(StrEnum):
    """What activation checkpointing keeps of a layer."""

    NONE = "none"
    OPERATORS = "operators"
    """torchtitan's `selective` with `op`."""
    BLOCKS = "blocks"
    """The layer's input alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchPolicy:
    """How an engine uses fully_shard."""

    weight_bytes: int
    """Of a parameter's shard as the optimizer updates it; gradients have its type."""
    moment_bytes: int
    """Both moments of Adam."""
    step_bytes: int
    """What the optimizer's step makes beside the states, per parameter of a shard."""
    keeps_weights_whole: bool
    """Whether weights stay gathered from the first forward to the last backward pass of a step."""
    defers_gradients: bool
    """Whether gradients of several micro batches are reduced after the last."""
    expert_gradient_bytes: int
    """Of an expert's gradient that waits; others wait in FP32."""
    expert_copy_bytes: float
    """Of quantized copies that stay beside an expert's weight."""
    loss_bytes: int
    """Per logit, while the loss runs."""
    checkpointing: Checkpointing
    is_compiled: bool
    """Whether layers are, so that nothing is kept that no gradient needs."""
    gathers_keys: bool
    """Whether attention gathers keys and values of all context-parallel ranks, one per head of queries."""
    stages: StagePolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchRank:
    """One pipeline rank at one moment."""

    pipeline_rank: int
    states_bytes: int
    """This rank's shards of weights and moments, and of gradients once there are any."""
    whole_bytes: int
    """Weights that are gathered or copied, and gradients that are not reduced yet."""
    kept_bytes: int
    """Of layers and between stages, until their backward pass or the step's end."""
    working_bytes: int
    """Of the layer, the loss or the optimizer's step that runs."""
    apart_bytes: int
    """Of the streams that gather and reduce, which the allocator gives to no other: shards of gradients,
    and the weights that were last gathered."""
    between_bytes: int
    """Free, but of no use to logits: what layers took forward, between what they keep."""
    peak_at: str

    @property
    def total_bytes(self) -> int:
        """What is allocated."""
        return self.states_bytes + self.whole_bytes + self.kept_bytes + self.working_bytes

    @property
    def cached_bytes(self) -> int:
        """With what the allocator cannot use for it."""
        return self.total_bytes + self.apart_bytes + self.between_bytes


@dataclass(frozen=True, slots=True)
class _Gathered:
    """Parameters of one rank that fully_shard gathers."""

    outside: int
    """Embedding and head."""
    layers: int
    experts: int
    """Of those in layers, routed experts', which are gathered and reduced apart."""
    num_layers: int

    @classmethod
    def of(cls, recipe: Recipe, rank: int, *, num_layers: int) -> _Gathered:
        """Those of one pipeline rank."""
        params, parts = rank_params(recipe, rank), rank_weights(recipe, rank)
        outside = sum(
            parts[part].on_rank(shards=recipe.parallel.tensor) for part in _OUTSIDE if part in parts
        )
        experts = params.expert - _unsharded_experts(recipe, params)
        return cls(outside, params.dense + experts - outside, experts, max(1, num_layers))

    @property
    def layer(self) -> int:
        """Of one layer."""
        return self.layers // self.num_layers

    @property
    def group(self) -> int:
        """Of one layer, the larger of what is gathered at once."""
        return max(self.experts, self.layers - self.experts) // self.num_layers


def torch_memory(recipe: Recipe, policy: TorchPolicy) -> tuple[TorchRank, ...]:
    """The moments of every pipeline rank that may be its fullest, rank by rank."""
    plain = recipe.model_copy(update={"recompute": Recompute()})
    # a layer's walk knows the buffers of Megatron-FSDP, which torch does not have
    unsharded = plain.parallel.model_copy(update={"data_sharding": "distributed_optimizer"})
    layers = ModelMemory(plain.model_copy(update={"parallel": unsharded}))
    ranks = range(recipe.parallel.pipeline)
    return tuple(moment for rank in ranks for moment in _moments(plain, layers, policy, rank))


def _moments(recipe: Recipe, layers: ModelMemory, policy: TorchPolicy, rank: int) -> Iterator[TorchRank]:
    chunks = [chunk for chunk in recipe.chunks() if chunk.pipeline_rank == rank]
    kinds = [recipe.model.is_moe_layer(layer) for chunk in chunks for layer in chunk.layers]
    params = rank_params(recipe, rank)
    shards = _sharded(recipe, params)
    kept = sum(_kept_bytes(recipe, layers, policy, is_moe=kind) for kind in kinds)
    kept = kept * chunks_in_flight(recipe, policy.stages, rank) // recipe.parallel.virtual_pipeline
    kept += stage_bytes(recipe, policy.stages, rank)
    states = (policy.weight_bytes + policy.moment_bytes) * shards
    if recipe.num_micro_batches > 1:
        # what nothing shards has its gradients from the first micro batch on
        states += policy.weight_bytes * _unsharded_experts(recipe, params)
    gathered = _Gathered.of(recipe, rank, num_layers=len(kinds))
    copies = round(policy.expert_copy_bytes * params.expert)
    whole = copies + _whole_bytes(recipe, policy, gathered)
    apart = policy.weight_bytes * shards + _BF16_BYTES * (gathered.outside + gathered.group)
    yield TorchRank(
        pipeline_rank=rank,
        states_bytes=states + policy.weight_bytes * shards,
        whole_bytes=copies,
        kept_bytes=0,
        working_bytes=policy.step_bytes * shards,
        apart_bytes=apart - policy.weight_bytes * shards,
        between_bytes=0,
        peak_at="optimizer step",
    )
    at_work = [
        ("layer", max((_layer_bytes(layers, policy, is_moe=kind) for kind in set(kinds)), default=0), 0)
    ]
    if any(chunk.has_loss for chunk in chunks):
        between = max((_forward_bytes(layers, is_moe=kind) for kind in set(kinds)), default=0)
        at_work.append(("loss", _loss_bytes(recipe, policy), between))
    for place, working, between in at_work:
        yield TorchRank(
            pipeline_rank=rank,
            states_bytes=states,
            whole_bytes=whole,
            kept_bytes=kept,
            working_bytes=working,
            apart_bytes=apart,
            between_bytes=between,
            peak_at=f"backward of {place}",
        )


def _sharded(recipe: Recipe, params: RankParams) -> int:
    """Parameters of this rank's shards: dense ones over data and context ranks, experts' over theirs."""
    return params.dense // recipe.parallel.dense_shards + params.expert // recipe.parallel.expert_data


def _unsharded_experts(recipe: Recipe, params: RankParams) -> int:
    """Experts' parameters of this rank where each rank has its own: fully_shard leaves them as they are."""
    return params.expert if recipe.parallel.expert_data == 1 else 0


def _whole_bytes(recipe: Recipe, policy: TorchPolicy, gathered: _Gathered) -> int:
    """BF16 weights that are gathered, 2 per parameter, and gradients that are not reduced yet.

    Embedding and head are whole throughout; of layers either all or the one at work and the next. Deferred
    gradients are added up in the type in which they are reduced (to_accumulated_grad_if_needed of
    fully_shard), beside those of the group at work in BF16; others are those of one layer, in BF16 and in
    FP32 on their way.
    """
    layers = gathered.layers if policy.keeps_weights_whole else min(gathered.layers, 2 * gathered.layer)
    whole = _BF16_BYTES * (gathered.outside + layers)
    if not policy.defers_gradients or recipe.num_micro_batches == 1:
        return whole + (_BF16_BYTES + _FP32_BYTES) * gathered.layer
    waiting = _FP32_BYTES * (gathered.outside + gathered.layers - gathered.experts)
    waiting += policy.expert_gradient_bytes * gathered.experts
    waiting = waiting * chunks_with_gradients(recipe) // recipe.parallel.virtual_pipeline
    return whole + waiting + _BF16_BYTES * gathered.group


def _kept_bytes(recipe: Recipe, layers: ModelMemory, policy: TorchPolicy, *, is_moe: bool) -> int:
    if policy.checkpointing is Checkpointing.BLOCKS:
        return layers.sizes.vector_bytes
    if policy.checkpointing is Checkpointing.OPERATORS:
        return operator_checkpoint_bytes(recipe, is_moe=is_moe, is_compiled=policy.is_compiled)
    return layers.layer(is_moe=is_moe, is_recomputed=False).kept_bytes


def _layer_bytes(layers: ModelMemory, policy: TorchPolicy, *, is_moe: bool) -> int:
    """Beside what is kept: all that was recomputed, the gradients, and what is gathered for them.

    With tensor parallelism the inputs of attention and MLP stay gathered, T H each, where Megatron-Core
    gathers again, and gathering along the sequence copies once more (`all_gather_tensor` of
    torch.distributed._functional_collectives). Context parallelism gathers keys and values, repeated for
    every head of queries, over all its ranks (tensor/experimental/_attention.py, _AllGatherRotater).
    """
    recipe = layers.recipe
    layer = layers.layer(is_moe=is_moe, is_recomputed=policy.checkpointing is not Checkpointing.NONE)
    held = layer.backward.total_bytes - layer.kept_bytes
    tensor, context = recipe.parallel.tensor, recipe.parallel.context
    if tensor > 1:
        held += 3 * _gathered_bytes(recipe)
    if context > 1 and policy.gathers_keys:
        heads = recipe.model.attention.num_heads // tensor
        tokens = context * token_counts(recipe).gathered
        held += 2 * activation_element_bytes(recipe) * tokens * heads * value_dim(recipe.model)
    return held


def _forward_bytes(layers: ModelMemory, *, is_moe: bool) -> int:
    """What a layer that saves nothing takes forward, with the copy that tensor parallelism makes."""
    copied = _gathered_bytes(layers.recipe) if layers.recipe.parallel.tensor > 1 else 0
    return layers.layer(is_moe=is_moe, is_recomputed=True).forward.total_bytes + copied


def _gathered_bytes(recipe: Recipe) -> int:
    return activation_element_bytes(recipe) * token_counts(recipe).gathered * recipe.model.hidden_size


def _loss_bytes(recipe: Recipe, policy: TorchPolicy) -> int:
    """Logits and what the loss makes of them, T V / TP of each; the head's input, and the final norm's."""
    tokens = token_counts(recipe)
    logits = tokens.gathered * recipe.model.vocab_size // recipe.parallel.tensor
    inputs = activation_element_bytes(recipe) * (tokens.gathered + tokens.sharded) * recipe.model.hidden_size
    return policy.loss_bytes * logits + inputs
