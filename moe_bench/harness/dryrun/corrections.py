"""What the recipe as asked would hold that the derived one does not, and the other way round, term by term.

Each term is a difference of two closed forms of `moe_bench.analysis`, or a closed form of its own with its
source. None has been compared with a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

from moe_bench.analysis.activations import activation_element_bytes, peak_in_flight_bytes, token_counts
from moe_bench.analysis.dispatch_buffers import dispatch_buffer_bytes
from moe_bench.analysis.memory import rank_memory
from moe_bench.analysis.tensors import chunk_tensors
from moe_bench.harness.dryrun.outcome import Correction
from moe_bench.spec.pipeline import pipeline_chunks
from moe_bench.spec.recipe import Recipe


def corrections(asked: Recipe, derived: Recipe, pipeline_rank: int) -> tuple[Correction, ...]:
    """All terms of one pipeline rank that are not zero, and those that nobody has a figure for."""
    terms = (
        *_states_and_activations(asked, derived, pipeline_rank),
        _padded_attention(asked, pipeline_rank),
        _dispatch_buffers(asked),
        _weight_gradients(asked, derived, pipeline_rank),
        *_without_figure(asked),
    )
    return tuple(term for term in terms if term.num_bytes != 0)


def _states_and_activations(asked: Recipe, derived: Recipe, pipeline_rank: int) -> Iterator[Correction]:
    real, built = (rank_memory(recipe, pipeline_rank) for recipe in (asked, derived))
    yield Correction(
        term="weights: quantized copies",
        num_bytes=real.weights_bytes - built.weights_bytes,
        source="analysis/memory.py weights_bytes",
    )
    yield Correction(
        term="optimizer states: other types, or on the host",
        num_bytes=real.optimizer_bytes - built.optimizer_bytes,
        source="analysis/memory.py optimizer_bytes",
    )
    yield Correction(
        term="activations: inputs kept in FP8, norms fused into projections",
        num_bytes=real.activations_bytes - built.activations_bytes,
        source="analysis/activations.py",
    )


def _padded_attention(asked: Recipe, pipeline_rank: int) -> Correction:
    """What torch's flash kernel keeps for MLA and cuDNN's fused attention does not.

    Values and output padded to the keys' width d_k, and the output once more at its own width d_v, where the
    real kernel keeps values (unless `mla_up_proj` makes them again) and one output: a T n / TP (2 d_k - d_v)
    per layer, with `mla_up_proj` a T n / TP 2 d_k (kernels/attention_kernels.py, flash_attention).
    """
    attention, recompute, parallel = asked.model.attention, asked.recompute, asked.parallel
    per_layer = 0
    is_kept = recompute.granularity != "full" and "core_attn" not in recompute.modules
    if attention.kind == "mla" and is_kept and parallel.context == 1:
        qk_dim = attention.qk_nope_head_dim + attention.qk_rope_head_dim
        real_dim = 0 if "mla_up_proj" in recompute.modules else attention.v_head_dim
        heads = attention.num_heads // parallel.tensor
        elements = token_counts(asked).gathered * heads * (2 * qk_dim - real_dim)
        per_layer = activation_element_bytes(asked) * elements
    chunks = pipeline_chunks(parallel, num_layers=asked.model.num_layers, num_mtp_layers=asked.num_mtp_layers)
    in_flight = peak_in_flight_bytes(
        [
            per_layer * (len(chunk.layers) + chunk.num_mtp_layers)
            for chunk in chunks
            if chunk.pipeline_rank == pipeline_rank
        ],
        num_micro_batches=asked.num_micro_batches,
        pipeline=parallel.pipeline,
        pipeline_rank=pipeline_rank,
        group_size=parallel.micro_batch_group_size or parallel.pipeline,
        overlaps_expert_parallel=asked.overlap.expert_parallel,
    )
    return Correction(
        term="attention: values and output padded for torch's flash kernel",
        num_bytes=-in_flight,
        source="harness/kernels/attention_kernels.py; transformer_engine 2.20.2, fused attention",
    )


def _dispatch_buffers(asked: Recipe) -> Correction:
    return Correction(
        term=f"dispatch: buffers of {asked.dispatch.dispatcher}",
        num_bytes=dispatch_buffer_bytes(asked),
        source="analysis/dispatch_buffers.py; deepseek-ai/DeepEP 94a9f8f6 csrc/config.hpp, csrc/hybrid_ep",
    )


def _weight_gradients(asked: Recipe, derived: Recipe, pipeline_rank: int) -> Correction:
    """What is not in flight where the GEMM adds to the buffer, and the placeholders that are there instead.

    Autograd wants a gradient all the same: Transformer Engine hands it one tensor per shape of weight, made
    once and kept.
    """
    num_bytes = 0
    if asked.kernels.fusions.gradient_accumulation:
        fusions = derived.kernels.fusions.model_copy(update={"gradient_accumulation": True})
        kernels = derived.kernels.model_copy(update={"fusions": fusions})
        fused = derived.model_copy(update={"kernels": kernels})
        num_bytes = rank_memory(fused, pipeline_rank).total_bytes
        num_bytes += _placeholder_bytes(asked, pipeline_rank)
        num_bytes -= rank_memory(derived, pipeline_rank).total_bytes
    return Correction(
        term="weight gradients in flight: added to the buffer in the GEMM, a placeholder per shape",
        num_bytes=num_bytes,
        source="transformer_engine 2.20.2 pytorch/module/base.py, get_dummy_wgrad",
    )


def _placeholder_bytes(asked: Recipe, pipeline_rank: int) -> int:
    """a times the elements of each shape that a matrix of a linear layer of the rank has."""
    chunks = pipeline_chunks(
        asked.parallel, num_layers=asked.model.num_layers, num_mtp_layers=asked.num_mtp_layers
    )
    shapes = {
        (tensor.num_elements, tensor.num_columns)
        for chunk in chunks
        if chunk.pipeline_rank == pipeline_rank
        for tensor in chunk_tensors(asked, chunk)
        if tensor.is_quantized
    }
    return activation_element_bytes(asked) * sum(num_elements for num_elements, _ in shapes)


def _without_figure(asked: Recipe) -> Iterator[Correction]:
    if asked.cuda_graphs.implementation != "none":
        yield Correction(
            term="CUDA graphs: their memory pools", num_bytes=None, source="torch.cuda.graph_pool_handle"
        )
    if asked.offload.num_activation_layers or asked.offload.modules or asked.offload.paged_stash:
        yield Correction(term="offloaded activations", num_bytes=None, source="megatron-core 0.19.2")
