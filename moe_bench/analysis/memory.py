"""Device memory of every pipeline rank of a recipe, part by part, and whether it fits the GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe_bench.analysis.activations import (
    activation_element_bytes,
    chunk_activation_bytes,
    expert_token_copies,
    kept_bytes,
    layer_tensors,
    peak_in_flight_bytes,
    token_counts,
)
from moe_bench.analysis.params import Part, RankParams, layer_weights, rank_params, rank_weights
from moe_bench.errors import BadInputError
from moe_bench.spec.pipeline import Chunk, pipeline_chunks
from moe_bench.spec.recipe import Precision, Recipe, StateDtype

GIB = 1024**3

CONTEXT_BYTES = 5 * GIB // 2
"""CUDA context and libraries (0.5 to 1.5 GiB outside the allocator) and NCCL's buffers (0.4 GiB per set of
communicators on one node, 1 to 3 GiB at scale)."""
FRAGMENTATION_FRACTION = 0.03
"""Reserved beyond allocated memory with expandable segments; without them 9 % and more have been seen."""
ACTIVATION_BIAS_FRACTION = 0.12
"""By how much activations of expert layers come out low (see activations.py)."""

_DTYPE_BYTES: Mapping[StateDtype, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}

_QUANTIZED_COPY_BYTES: Mapping[Precision, float] = {
    "fp8_delayed": 2.0,
    "fp8_tensorwise": 2.0,
    "fp8_blockwise": 2.0,
    "fp8_rowwise": 2.0,
    "mxfp8": 2 * (1 + 1 / 32),
    "nvfp4": 2 * (1 / 2 + 1 / 16),
}
"""Bytes per weight of the row-wise and column-wise copies that Transformer Engine keeps, scales included
(transformer_engine/pytorch, quantized weight workspaces). Hopper needs both; not measured here."""

_QUANTIZED_PARTS = frozenset(
    (Part.ATTENTION, Part.DENSE_MLP, Part.SHARED_EXPERTS, Part.ROUTED_EXPERTS, Part.MTP_PROJECTION)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Peak device memory of every rank of one pipeline rank."""

    pipeline_rank: int
    weights_bytes: int
    """Weights as stored, with the quantized copies of FP8 and FP4."""
    gradients_bytes: int
    optimizer_bytes: int
    """Main weights and moments."""
    activations_bytes: int
    """Left by forward passes whose backward pass has not run."""
    recompute_bytes: int
    """Brought back for the layer whose backward pass runs."""
    layer_backward_bytes: int
    """Input and output gradients of the largest product of one layer."""
    logits_bytes: int
    """Logits and their gradient, where the loss is computed."""
    gathered_bytes: int
    """Whole layers that Megatron-FSDP gathers."""

    @property
    def states_bytes(self) -> int:
        """What stays from step to step."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes

    @property
    def transient_bytes(self) -> int:
        """The larger of what the loss and one layer's backward pass need; they never run at once."""
        return max(self.recompute_bytes + self.layer_backward_bytes, self.logits_bytes) + self.gathered_bytes

    @property
    def total_bytes(self) -> int:
        """States, activations in flight and transients."""
        return self.states_bytes + self.activations_bytes + self.transient_bytes


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
    """The closed form with its margins: context, fragmentation, and the known bias of the activations.

    M = (1 + 3 %) (states + (1 + 12 %) (activations + transients)) + 2.5 GiB, see the constants above.
    """
    moving = memory.activations_bytes + memory.transient_bytes
    allocated = memory.states_bytes + round((1 + ACTIVATION_BIAS_FRACTION) * moving)
    return round((1 + FRAGMENTATION_FRACTION) * allocated) + CONTEXT_BYTES


def memory_fit(recipe: Recipe) -> MemoryFit:
    """Memory of every pipeline rank beside the GPU's. Raises BadInputError for a system without GPU."""
    gpu = recipe.system.gpu
    if gpu is None:
        raise BadInputError(
            f"{recipe.name}: system {recipe.system.key} has no GPU whose memory could be filled; "
            "choose a system of recipes/systems with one"
        )
    return MemoryFit(ranks=pipeline_memory(recipe), usable_bytes=gpu.usable_bytes)


def fits(recipe: Recipe) -> bool:
    """Whether `recipe` fits its GPU, margins included. Raises BadInputError for a system without GPU."""
    return memory_fit(recipe).fits


def pipeline_memory(recipe: Recipe) -> tuple[RankMemory, ...]:
    """Memory of every pipeline rank, in order."""
    return tuple(rank_memory(recipe, rank) for rank in range(recipe.parallel.pipeline))


def rank_memory(recipe: Recipe, pipeline_rank: int) -> RankMemory:
    """Peak memory of pipeline rank `pipeline_rank`.

    Left out: buffers of DeepEP and HybridEP, pipeline transfers (one activation each), the FP32 copies of
    BF16 gradients that an optimizer without `main_params_dtype` support makes in the step, CUDA graph pools.
    """
    parallel = recipe.parallel
    chunks = [
        chunk
        for chunk in pipeline_chunks(
            parallel, num_layers=recipe.model.num_layers, num_mtp_layers=recipe.num_mtp_layers
        )
        if chunk.pipeline_rank == pipeline_rank
    ]
    params = rank_params(recipe, pipeline_rank)
    return RankMemory(
        pipeline_rank=pipeline_rank,
        weights_bytes=weights_bytes(recipe, params) + _quantized_bytes(recipe, pipeline_rank),
        gradients_bytes=gradients_bytes(recipe, params),
        optimizer_bytes=optimizer_bytes(recipe, params),
        activations_bytes=peak_in_flight_bytes(
            [chunk_activation_bytes(recipe, chunk) for chunk in chunks],
            num_micro_batches=recipe.num_micro_batches,
            pipeline=parallel.pipeline,
            pipeline_rank=pipeline_rank,
            group_size=parallel.micro_batch_group_size or parallel.pipeline,
            overlaps_expert_parallel=recipe.overlap.expert_parallel,
        ),
        recompute_bytes=_recompute_bytes(recipe, chunks),
        layer_backward_bytes=_layer_backward_bytes(recipe, chunks),
        logits_bytes=logits_bytes(recipe) if any(chunk.has_loss for chunk in chunks) else 0,
        gathered_bytes=_gathered_bytes(recipe, chunks),
    )


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
    return _state_bytes(recipe, params, _DTYPE_BYTES[recipe.optimizer.gradient_dtype], is_sharded=is_sharded)


def optimizer_bytes(recipe: Recipe, params: RankParams) -> int:
    """Main weights and moments on the device: o P / d, dense d = DP x CP, experts d = expert data parallel.

    o = main + first [+ second] moment; FP32 weights are their own main copy; Muon and SGD keep one moment.
    That is 12 bytes in FP32 for BF16 weights (dist_optimizer.md of Megatron-Core: 6 + 12 / d in all).
    Transformer Engine's FusedAdam may store only the 16 bits of the main weight that the BF16 weight lacks
    (`store_param_remainders`), two bytes less, which is not credited.
    """
    optimizer = recipe.optimizer
    moments = [_DTYPE_BYTES[optimizer.exp_avg_dtype]]
    if optimizer.name == "adam":
        moments.append(_DTYPE_BYTES[optimizer.exp_avg_sq_dtype])
    main = 0 if recipe.precision == "fp32" else _DTYPE_BYTES[optimizer.main_params_dtype]
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
    """Quantized copies of the weights of products, `_QUANTIZED_COPY_BYTES` per weight on this rank."""
    if recipe.precision not in _QUANTIZED_COPY_BYTES:
        return 0
    parallel = recipe.parallel
    num_weights = 0
    for part, weights in rank_weights(recipe, pipeline_rank).items():
        if part is Part.ROUTED_EXPERTS:
            num_weights += weights.on_rank(shards=parallel.expert_tensor) // parallel.expert
        elif part in _QUANTIZED_PARTS:
            num_weights += weights.on_rank(shards=parallel.tensor)
    return round(num_weights * _QUANTIZED_COPY_BYTES[recipe.precision])


def _layer_kinds(recipe: Recipe, chunks: list[Chunk]) -> set[bool]:
    """Which kinds of layers, expert or dense, stand on a rank."""
    model = recipe.model
    kinds = {model.is_moe_layer(layer) for chunk in chunks for layer in chunk.layers}
    if any(chunk.num_mtp_layers for chunk in chunks):
        kinds.add(model.is_moe_layer(model.num_layers - 1))
    return kinds


def _recompute_bytes(recipe: Recipe, chunks: list[Chunk]) -> int:
    """What recomputation brings back at once: the freed tensors of one layer, or of one unit of layers."""
    recompute = recipe.recompute
    kinds = _layer_kinds(recipe, chunks)
    if recompute.granularity == "none" or not kinds:
        return 0
    tensors = [layer_tensors(recipe, is_moe=is_moe) for is_moe in kinds]
    if recompute.granularity == "selective":
        return max(kept_bytes(layer, ()) - kept_bytes(layer, recompute.modules) for layer in tensors)
    num_layers = max(1, recompute.num_layers) if recompute.method == "uniform" else 1
    return num_layers * max(kept_bytes(layer, ()) for layer in tensors)


def _layer_backward_bytes(recipe: Recipe, chunks: list[Chunk]) -> int:
    """Gradients around the first product of an MLP: a rows (H + 2 F), rows = t k of the experts, or T."""
    model = recipe.model
    element = activation_element_bytes(recipe)
    candidates = [0]
    for is_moe in _layer_kinds(recipe, chunks):
        if is_moe and model.moe is not None:
            copies = expert_token_copies(recipe, model.moe)
            candidates.append(copies * (model.hidden_size + 2 * model.moe.expert_ffn_hidden_size))
        else:
            ffn = (model.dense_ffn_hidden_size or 0) // recipe.parallel.tensor
            candidates.append(token_counts(recipe).gathered * (model.hidden_size + 2 * ffn))
    return element * max(candidates)


def logits_bytes(recipe: Recipe) -> int:
    """Logits, their FP32 form and gradient: c T V / TP per prediction, and three gathered vectors, 3 a T H.

    c = 2 with Transformer Engine's fused loss (gradient in place), 6 with Megatron-Core's fused one, 10
    without fusion; 4, 8 and 12 in FP32. The gathered vectors are an inference from SimuMax's dense rows, not
    read code.
    """
    element = activation_element_bytes(recipe)
    per_logit = {"te": 0, "native": 4, "none": 8}[recipe.kernels.fusions.cross_entropy] + element
    tokens = token_counts(recipe).gathered
    one_prediction = per_logit * tokens * recipe.model.vocab_size // recipe.parallel.tensor
    return one_prediction * (1 + recipe.num_mtp_layers) + 3 * element * tokens * recipe.model.hidden_size


def _gathered_bytes(recipe: Recipe, chunks: list[Chunk]) -> int:
    """Megatron-FSDP's unsharded weights and gradients of the layer at work and the one fetched ahead."""
    parallel, model = recipe.parallel, recipe.model
    if parallel.data_sharding != "megatron_fsdp" or parallel.fsdp_strategy == "optim":
        return 0
    num_experts = model.moe.num_experts if model.moe else 0
    largest = 0
    for is_moe in _layer_kinds(recipe, chunks):
        parts = layer_weights(model, is_moe=is_moe, num_experts=num_experts, family=recipe.kernels.family)
        on_rank = sum(
            weights.on_rank(shards=parallel.expert_tensor) // parallel.expert
            if part is Part.ROUTED_EXPERTS
            else weights.on_rank(shards=parallel.tensor)
            for part, weights in parts.items()
        )
        largest = max(largest, on_rank)
    element = _DTYPE_BYTES[recipe.optimizer.gradient_dtype]
    if parallel.fsdp_strategy == "optim_grads_params":
        element += activation_element_bytes(recipe)
    return 2 * largest * element
