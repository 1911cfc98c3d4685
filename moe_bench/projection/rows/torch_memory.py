"""Device memory of a step under torch's fully_shard, as torchtitan and NeMo Automodel train, in closed form.

pytorch/torchtitan 9dec370 (2024-12) and 5b5d468 (2025-09): parallelisms/parallelize_llama.py,
distributed/activation_checkpoint.py, models/deepseek_v3/infra/parallelize.py; NVIDIA-NeMo/Automodel 77f1123:
components/moe/parallelizer.py, components/loss/masked_ce.py. What a layer holds while it runs is the closed
form's for Megatron-Core.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from moe_bench.analysis.activations import token_counts
from moe_bench.analysis.chunk_memory import ModelMemory
from moe_bench.analysis.params import Part, RankParams, rank_params, rank_weights
from moe_bench.projection.rows.torch_kept import operator_checkpoint_bytes
from moe_bench.spec.pipeline import Chunk
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
    loss_bytes: int
    """Per logit, while the loss runs."""
    checkpointing: Checkpointing
    num_chunks_in_flight: int | None = None
    """Of a schedule that says so itself; None for 1F1B, interleaved or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchRank:
    """One pipeline rank at its fullest moment."""

    pipeline_rank: int
    states_bytes: int
    """This rank's shards of weights and moments, and of gradients once there are any."""
    whole_bytes: int
    """Weights that are gathered, and gradients that are not reduced yet."""
    kept_bytes: int
    """Of layers, until their backward pass."""
    working_bytes: int
    """Of the layer, the loss or the optimizer's step that runs."""
    peak_at: str

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.states_bytes + self.whole_bytes + self.kept_bytes + self.working_bytes


def torch_memory(recipe: Recipe, policy: TorchPolicy) -> tuple[TorchRank, ...]:
    """Every pipeline rank, in order."""
    plain = recipe.model_copy(update={"recompute": Recompute()})
    layers = ModelMemory(plain)
    return tuple(_rank(plain, layers, policy, rank) for rank in range(recipe.parallel.pipeline))


def _rank(recipe: Recipe, layers: ModelMemory, policy: TorchPolicy, rank: int) -> TorchRank:
    chunks = [chunk for chunk in _chunks(recipe) if chunk.pipeline_rank == rank]
    kinds = [recipe.model.is_moe_layer(layer) for chunk in chunks for layer in chunk.layers]
    params = rank_params(recipe, rank)
    shards = _sharded(recipe, params)
    kept = sum(_kept_bytes(recipe, layers, policy, is_moe=kind) for kind in kinds)
    kept = kept * _chunks_in_flight(recipe, policy, rank) // recipe.parallel.virtual_pipeline
    whole = _whole_bytes(recipe, policy, rank, num_layers=len(kinds))
    states = (policy.weight_bytes + policy.moment_bytes) * shards
    if recipe.num_micro_batches > 1:
        # what nothing shards has its gradients from the first micro batch on
        states += policy.weight_bytes * _unsharded_experts(recipe, params)
    moments = [
        TorchRank(
            pipeline_rank=rank,
            states_bytes=states + policy.weight_bytes * shards,
            whole_bytes=0,
            kept_bytes=0,
            working_bytes=policy.step_bytes * shards,
            peak_at="optimizer step",
        )
    ]
    at_work = {"layer": max((_layer_bytes(layers, policy, is_moe=kind) for kind in set(kinds)), default=0)}
    if any(chunk.has_loss for chunk in chunks):
        at_work["loss"] = _loss_bytes(recipe, policy)
    moments += [
        TorchRank(
            pipeline_rank=rank,
            states_bytes=states,
            whole_bytes=whole,
            kept_bytes=kept,
            working_bytes=working,
            peak_at=f"backward of {place}",
        )
        for place, working in at_work.items()
    ]
    return max(moments, key=lambda moment: moment.total_bytes)


def _chunks(recipe: Recipe) -> tuple[Chunk, ...]:
    return recipe.chunks()


def _sharded(recipe: Recipe, params: RankParams) -> int:
    """Parameters of this rank's shards: dense ones over data and context ranks, experts' over theirs."""
    return params.dense // recipe.parallel.dense_shards + params.expert // recipe.parallel.expert_data


def _unsharded_experts(recipe: Recipe, params: RankParams) -> int:
    """Experts' parameters of this rank where each rank has its own: fully_shard leaves them as they are."""
    return params.expert if recipe.parallel.expert_data == 1 else 0


def _whole_bytes(recipe: Recipe, policy: TorchPolicy, rank: int, *, num_layers: int) -> int:
    """BF16 weights that are gathered, 2 per parameter, and gradients that are not reduced yet.

    Embedding and head are whole throughout; of layers either all or the one at work and the next. Deferred
    gradients are added up in FP32 (to_accumulated_grad_if_needed of fully_shard), others are those of one
    layer, in BF16 and in FP32 on their way.
    """
    params, parts = rank_params(recipe, rank), rank_weights(recipe, rank)
    outside = sum(parts[part].on_rank(shards=recipe.parallel.tensor) for part in _OUTSIDE if part in parts)
    sharded = params.dense + params.expert - _unsharded_experts(recipe, params)
    in_layers = sharded - outside
    layer = in_layers // max(1, num_layers)
    whole = _BF16_BYTES * (outside + (in_layers if policy.keeps_weights_whole else min(in_layers, 2 * layer)))
    if policy.defers_gradients and recipe.num_micro_batches > 1:
        return whole + _FP32_BYTES * sharded
    return whole + (_BF16_BYTES + _FP32_BYTES) * layer


def _kept_bytes(recipe: Recipe, layers: ModelMemory, policy: TorchPolicy, *, is_moe: bool) -> int:
    if policy.checkpointing is Checkpointing.BLOCKS:
        return layers.sizes.vector_bytes
    if policy.checkpointing is Checkpointing.OPERATORS:
        return operator_checkpoint_bytes(recipe, is_moe=is_moe)
    return layers.layer(is_moe=is_moe, is_recomputed=False).kept_bytes


def _layer_bytes(layers: ModelMemory, policy: TorchPolicy, *, is_moe: bool) -> int:
    """Beside what is kept: all that was recomputed, and the gradients."""
    if policy.checkpointing is Checkpointing.NONE:
        layer = layers.layer(is_moe=is_moe, is_recomputed=False)
        return layer.backward.total_bytes - layer.kept_bytes
    layer = layers.layer(is_moe=is_moe, is_recomputed=True)
    return layer.backward.total_bytes - layer.kept_bytes


def _loss_bytes(recipe: Recipe, policy: TorchPolicy) -> int:
    """Logits and what the loss makes of them, T V / TP of each."""
    logits = token_counts(recipe).gathered * recipe.model.vocab_size // recipe.parallel.tensor
    return policy.loss_bytes * logits


def _chunks_in_flight(recipe: Recipe, policy: TorchPolicy, rank: int) -> int:
    """Forward passes of chunks that wait for their backward pass.

    PP - rank micro batches, or, interleaved, 2 (PP - rank - 1) + (VPP - 1) PP + 1 chunks.
    """
    pipeline, num_chunks = recipe.parallel.pipeline, recipe.parallel.virtual_pipeline
    asked = policy.num_chunks_in_flight
    if asked is None and num_chunks > 1:
        asked = 2 * (pipeline - rank - 1) + (num_chunks - 1) * pipeline + 1
    return min(recipe.num_micro_batches * num_chunks, pipeline - rank if asked is None else asked)
