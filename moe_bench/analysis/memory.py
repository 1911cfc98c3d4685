"""Device memory of every pipeline rank of a recipe, part by part, and whether it fits the GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe_bench.analysis.activations import activation_element_bytes, keeps_experts_row_wise
from moe_bench.analysis.chunk_memory import ModelMemory
from moe_bench.analysis.fsdp_memory import fsdp_in_flight
from moe_bench.analysis.outside_memory import outside_bytes
from moe_bench.analysis.params import Part, RankParams, rank_params, rank_weights
from moe_bench.analysis.resident_memory import resident_bytes
from moe_bench.analysis.schedule_memory import step_peak
from moe_bench.errors import BadInputError
from moe_bench.spec.recipe import Precision, Recipe, StateDtype

GIB = 1024**3

CONTEXT_BYTES = 5 * GIB // 2
"""CUDA context and libraries (0.5 to 1.5 GiB outside the allocator) and NCCL's buffers (0.4 GiB per set of
communicators on one node, 1 to 3 GiB at scale)."""
LONE_CONTEXT_BYTES = GIB
"""The same of one process that sends nothing."""
FRAGMENTATION_FRACTION = 0.03
"""Reserved beyond allocated memory with expandable segments; without them 9 % and more have been seen."""

STATE_BYTES: Mapping[StateDtype, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}

_QUANTIZED_COPY_BYTES: Mapping[Precision, float] = {
    "fp8_delayed": 2.0,
    "fp8_tensorwise": 2.0,
    "fp8_blockwise": 2.0,
    "mxfp8": 2 * (1 + 1 / 32),
    "nvfp4": 2 * (1 / 2 + 1 / 16),
}
"""Bytes per weight of the row-wise and column-wise copies that Transformer Engine keeps, scales included
(transformer_engine/pytorch, quantized weight workspaces). Hopper needs both; not measured here."""

_INPUT_BYTES = 3 * 8 + 4

_QUANTIZED_PARTS = frozenset(
    (Part.ATTENTION, Part.DENSE_MLP, Part.SHARED_EXPERTS, Part.ROUTED_EXPERTS, Part.MTP_PROJECTION)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Device memory of every rank of one pipeline rank at the fullest moment of a step.

    Categories are those of a dry run (harness/dryrun/accounting.py), by the pass that takes the memory.
    """

    pipeline_rank: int
    weights_bytes: int
    """Weights as stored, with the quantized copies of FP8 and FP4."""
    gradients_bytes: int
    optimizer_bytes: int
    """Main weights and moments."""
    inputs_bytes: int
    """Tokens, labels, positions and loss mask of all micro batches of a step."""
    activations_bytes: int
    """Made by forward passes: kept for the backward pass, or just passing."""
    recomputed_bytes: int
    """Made again in the backward pass."""
    backward_bytes: int
    """Gradients of activations and weights on their way."""
    pipeline_bytes: int
    """Received from pipeline neighbours."""
    gathered_bytes: int
    """Whole weights that Megatron-FSDP gathers."""
    outside_bytes: int
    """At most, outside of torch's allocator or of no use to it: the dispatcher's buffers, CUDA graphs."""
    peak_at: str
    """Which pass through which part of the model it is: `backward of experts`."""

    @property
    def states_bytes(self) -> int:
        """What stays from step to step."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes

    @property
    def transient_bytes(self) -> int:
        """Everything beside states and activations."""
        return (
            self.inputs_bytes
            + self.recomputed_bytes
            + self.backward_bytes
            + self.pipeline_bytes
            + self.gathered_bytes
        )

    @property
    def total_bytes(self) -> int:
        """States, activations and transients."""
        return self.states_bytes + self.activations_bytes + self.transient_bytes

    @property
    def bytes_by_category(self) -> dict[str, int]:
        """By the names that a dry run gives them."""
        return {
            "weights": self.weights_bytes,
            "gradients": self.gradients_bytes,
            "optimizer states": self.optimizer_bytes,
            "inputs": self.inputs_bytes,
            "activations": self.activations_bytes,
            "recomputed": self.recomputed_bytes,
            "backward": self.backward_bytes,
            "pipeline": self.pipeline_bytes,
            "synchronisation": self.gathered_bytes,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFit:
    """Whether a recipe fits its GPU, judged by its fullest pipeline rank."""

    ranks: tuple[RankMemory, ...]
    usable_bytes: int

    @property
    def worst(self) -> RankMemory:
        """The pipeline rank that needs most."""
        return max(self.ranks, key=needed_bytes)

    @property
    def fits(self) -> bool:
        """Whether even the fullest rank stays below the usable memory, margins included."""
        return needed_bytes(self.worst) <= self.usable_bytes


def needed_bytes(memory: RankMemory) -> int:
    """The closed form with its margins: M = (1 + 3 %) total + 2.5 GiB + what is outside of it, see above."""
    return round((1 + FRAGMENTATION_FRACTION) * memory.total_bytes) + CONTEXT_BYTES + memory.outside_bytes


def memory_fit(recipe: Recipe, *, load: float = 1.0) -> MemoryFit:
    """Memory of every pipeline rank beside the GPU's; `load` as in `pipeline_memory`.

    Raises BadInputError for a system without GPU.
    """
    usable = usable_bytes(recipe)
    return MemoryFit(ranks=pipeline_memory(recipe, load=load), usable_bytes=usable)


def usable_bytes(recipe: Recipe) -> int:
    """What the recipe's GPU can hold. Raises BadInputError for a system without GPU."""
    gpu = recipe.system.gpu
    if gpu is None:
        raise BadInputError(
            f"{recipe.name}: system {recipe.system.key} has no GPU whose memory could be filled; "
            "choose a system of recipes/systems with one"
        )
    return gpu.usable_bytes


def fits(recipe: Recipe) -> bool:
    """Whether `recipe` fits its GPU, margins included. Raises BadInputError for a system without GPU."""
    return memory_fit(recipe).fits


def rank_fits(recipe: Recipe, pipeline_rank: int) -> bool:
    """Whether a rank of pipeline rank `pipeline_rank`, alone on a GPU of the recipe's, fits: 1.03 M + 1 GiB.

    The margins are those of `needed_bytes` without NCCL's buffers. Raises BadInputError for a system without
    GPU.
    """
    held = rank_memory(recipe, pipeline_rank).total_bytes
    return (1 + FRAGMENTATION_FRACTION) * held + LONE_CONTEXT_BYTES <= usable_bytes(recipe)


def pipeline_memory(recipe: Recipe, *, load: float = 1.0) -> tuple[RankMemory, ...]:
    """Memory of every pipeline rank, in order; of its ranks the one whose experts receive `load` times the
    mean in every layer.
    """
    model = ModelMemory(recipe, load=load)
    return tuple(_rank_memory(recipe, rank, model) for rank in range(recipe.parallel.pipeline))


def rank_memory(recipe: Recipe, pipeline_rank: int) -> RankMemory:
    """Peak memory of pipeline rank `pipeline_rank`.

    Left out: the optimizer step, which never was the fullest moment, with the FP32 copies of BF16 gradients
    that an optimizer without `main_params_dtype` support makes in it. Buffers of dispatchers and CUDA graphs
    are in the margins alone (`outside_bytes`).
    """
    return _rank_memory(recipe, pipeline_rank, ModelMemory(recipe))


def _rank_memory(recipe: Recipe, pipeline_rank: int, model: ModelMemory) -> RankMemory:
    chunks = [chunk for chunk in recipe.chunks() if chunk.pipeline_rank == pipeline_rank]
    params = rank_params(recipe, pipeline_rank)
    peak = step_peak(recipe, [model.chunk(chunk) for chunk in chunks], vector_bytes=model.sizes.vector_bytes)
    whole = fsdp_in_flight(recipe, chunks)
    activations = peak.held.activations_bytes + resident_bytes(recipe, chunks, model)
    backward = peak.held.backward_bytes + whole.gradients_bytes
    passing = activations + peak.held.recomputed_bytes + backward
    return RankMemory(
        pipeline_rank=pipeline_rank,
        weights_bytes=weights_bytes(recipe, params) + _quantized_bytes(recipe, pipeline_rank),
        gradients_bytes=gradients_bytes(recipe, params),
        optimizer_bytes=optimizer_bytes(recipe, params),
        inputs_bytes=inputs_bytes(recipe),
        activations_bytes=activations,
        recomputed_bytes=peak.held.recomputed_bytes,
        backward_bytes=backward,
        pipeline_bytes=peak.pipeline_bytes,
        gathered_bytes=whole.weights_bytes,
        outside_bytes=outside_bytes(recipe, chunks, passing_bytes=passing),
        peak_at=f"{peak.phase} of {peak.place}",
    )


def inputs_bytes(recipe: Recipe) -> int:
    """Tokens, labels and positions in int64 and an FP32 loss mask of every micro batch: 28 S b m / CP."""
    tokens = recipe.seq_len // recipe.parallel.context * recipe.micro_batch_size
    return _INPUT_BYTES * tokens * recipe.num_micro_batches


def weights_bytes(recipe: Recipe, params: RankParams) -> int:
    """Weights: w P, w = 2 in BF16, 4 in FP32; Megatron-FSDP with `optim_grads_params` divides them by the
    shards.

    Weights kept in FP8 (`low_precision.param_gather`) have no BF16 form: w = 0 here, their copies are apart.
    """
    is_sharded = recipe.parallel.data_sharding == "megatron_fsdp"
    is_sharded &= recipe.parallel.fsdp_strategy == "optim_grads_params"
    in_fp8 = recipe.low_precision is not None and recipe.low_precision.param_gather
    element = 0 if in_fp8 else activation_element_bytes(recipe)
    return _state_bytes(recipe, params, element, is_sharded=is_sharded)


def gradients_bytes(recipe: Recipe, params: RankParams) -> int:
    """Accumulated gradients: g P, g by `optimizer.gradient_dtype`; divided only by Megatron-FSDP's
    strategies with gradients, since the distributed optimizer reduces a whole buffer (dist_optimizer.md of
    Megatron-Core).
    """
    is_sharded = recipe.parallel.data_sharding == "megatron_fsdp" and recipe.parallel.fsdp_strategy != "optim"
    return _state_bytes(recipe, params, STATE_BYTES[recipe.optimizer.gradient_dtype], is_sharded=is_sharded)


def optimizer_bytes(recipe: Recipe, params: RankParams) -> int:
    """Main weights and moments on the device: o P / d, dense d = DP x CP, experts d = expert data parallel.

    o = main + first [+ second] moment; FP32 weights are their own main copy; Muon and SGD keep one moment.
    That is 12 bytes in FP32 for BF16 weights (dist_optimizer.md of Megatron-Core: 6 + 12 / d in all).
    Transformer Engine's FusedAdam may store only the 16 bits of the main weight that the BF16 weight lacks
    (`store_param_remainders`), two bytes less, which is not credited.
    """
    optimizer = recipe.optimizer
    moments = [STATE_BYTES[optimizer.exp_avg_dtype]]
    if optimizer.name == "adam":
        moments.append(STATE_BYTES[optimizer.exp_avg_sq_dtype])
    main = 0 if recipe.precision == "fp32" else STATE_BYTES[optimizer.main_params_dtype]
    whole = _state_bytes(
        recipe, params, main + sum(moments), is_sharded=recipe.parallel.data_sharding != "none"
    )
    return round(whole * (1 - recipe.offload.optimizer_fraction))


def _state_bytes(recipe: Recipe, params: RankParams, element_bytes: int, *, is_sharded: bool) -> int:
    parallel = recipe.parallel
    instances = parallel.num_optimizer_instances
    dense_shards = max(1, parallel.dense_shards // instances) if is_sharded else 1
    expert_shards = max(1, parallel.expert_data // instances) if is_sharded else 1
    dense = -(-params.dense * element_bytes // dense_shards)
    return dense + -(-params.expert * element_bytes // expert_shards)


def _quantized_bytes(recipe: Recipe, pipeline_rank: int) -> int:
    """Quantized copies of the weights of products, `_QUANTIZED_COPY_BYTES` per weight on this rank.

    Blackwell multiplies per-tensor FP8 in any layout, so that one copy does (transformer_engine 2.20.2,
    pytorch/utils.py, is_non_tn_fp8_gemm_supported). Megatron-FSDP keeps its shard, and quantizes what it
    gathers layer by layer.
    """
    if keeps_experts_row_wise(recipe):
        return _row_wise_bytes(recipe, pipeline_rank)
    if recipe.precision not in _QUANTIZED_COPY_BYTES:
        return 0
    parallel = recipe.parallel
    is_sharded = parallel.data_sharding == "megatron_fsdp" and parallel.fsdp_strategy == "optim_grads_params"
    dense_shards, expert_shards = (parallel.dense_shards, parallel.expert_data) if is_sharded else (1, 1)
    num_weights = 0
    for part, weights in rank_weights(recipe, pipeline_rank).items():
        if part is Part.ROUTED_EXPERTS:
            on_rank = weights.on_rank(shards=parallel.expert_tensor) // parallel.expert
            num_weights += on_rank // expert_shards
        elif part in _QUANTIZED_PARTS:
            num_weights += weights.on_rank(shards=parallel.tensor) // dense_shards
    return round(num_weights * _copy_bytes(recipe))


def _row_wise_bytes(recipe: Recipe, pipeline_rank: int) -> int:
    """Of each weight of the routed experts two bytes, and an FP32 scale for each row of both copies:
    2 P + 4 E (out + in) per product (harness/kernels/fp8_grouped.py).
    """
    model, parallel = recipe.model, recipe.parallel
    weights = rank_weights(recipe, pipeline_rank).get(Part.ROUTED_EXPERTS)
    if model.moe is None or weights is None:
        return 0
    num_weights = weights.on_rank(shards=parallel.expert_tensor) // parallel.expert
    halves = 1 + model.activation.is_gated
    num_rows = 0
    for layer in recipe.layers_of(pipeline_rank):
        moe = model.at(layer).moe if layer.ffn == "moe" else None
        if moe is not None:
            ffn = moe.expert_ffn_hidden_size // parallel.expert_tensor
            rows = 2 * model.expert_hidden_size + (1 + halves) * ffn
            num_rows += rows * (moe.num_experts // parallel.expert)
    return 2 * num_weights + 4 * num_rows


def _copy_bytes(recipe: Recipe) -> float:
    gpu = recipe.system.gpu
    takes_any_layout = gpu is not None and gpu.architecture == "blackwell"
    if takes_any_layout and recipe.precision in ("fp8_delayed", "fp8_tensorwise"):
        return 1.0
    return _QUANTIZED_COPY_BYTES[recipe.precision]
