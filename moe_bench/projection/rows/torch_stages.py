"""What pipeline stages of torch hold: micro batches in flight, and tensors from and for their neighbours.

torch.distributed.pipelining, stage.py and schedules.py of 2024-12 to 2026-08.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_bench.analysis.activations import activation_element_bytes, token_counts
from moe_bench.spec.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePolicy:
    """How an engine uses torch's pipelines."""

    num_buffered: int
    """Micro batches of one schedule, each of which has buffers of its own."""
    keeps_outputs: bool
    """Whether outputs of stages stay until the step ends, not until their backward pass: torch before
    pytorch/pytorch #153383 of 2025-05."""
    keeps_logits: bool
    """Whether those of the last stage do: unless an engine asks for no outputs."""
    num_chunks_in_flight: int | None = None
    """Of a schedule that says so itself; None for 1F1B, interleaved or not."""


def chunks_in_flight(recipe: Recipe, policy: StagePolicy, rank: int) -> int:
    """Forward passes of chunks that wait for their backward pass.

    PP - rank micro batches, or, interleaved, 2 (PP - rank - 1) + (VPP - 1) PP + 1 chunks.
    """
    pipeline, num_chunks = recipe.parallel.pipeline, recipe.parallel.virtual_pipeline
    asked = policy.num_chunks_in_flight
    if asked is None and num_chunks > 1:
        asked = 2 * (pipeline - rank - 1) + (num_chunks - 1) * pipeline + 1
    return min(recipe.num_micro_batches * num_chunks, pipeline - rank if asked is None else asked)


def chunks_with_gradients(recipe: Recipe) -> int:
    """Chunks of one rank that have gradients while most is in flight.

    With no more micro batches than stages, all forward passes come before the second chunk's first backward
    pass, and a chunk's gradients are reduced after its last.
    """
    is_short = recipe.num_micro_batches <= recipe.parallel.pipeline
    return 1 if is_short else recipe.parallel.virtual_pipeline


def stage_bytes(recipe: Recipe, policy: StagePolicy, rank: int) -> int:
    """Beside the inputs of layers in flight: buffers to receive into, and outputs.

    A vector a t H per micro batch and chunk for what comes from the stage before and for the gradient from
    the one behind, made at the first step and never let go (pytorch/pytorch #136380, mended in #193872 of
    2026-08); outputs, which of the last stage are logits.
    """
    pipeline, num_chunks = recipe.parallel.pipeline, recipe.parallel.virtual_pipeline
    if pipeline == 1:
        return 0
    tokens, element = token_counts(recipe), activation_element_bytes(recipe)
    is_last = rank == pipeline - 1
    num_fed, num_feeding = num_chunks - (rank == 0), num_chunks - is_last
    per_chunk = chunks_in_flight(recipe, policy, rank) / num_chunks
    num_vectors = num_fed * max(0.0, policy.num_buffered - per_chunk) + num_feeding * policy.num_buffered
    num_vectors += num_feeding * (policy.num_buffered if policy.keeps_outputs else per_chunk)
    held = round(num_vectors * element * tokens.sharded * recipe.model.hidden_size)
    if is_last and policy.keeps_logits:
        logits = tokens.gathered * recipe.model.vocab_size // recipe.parallel.tensor
        held += policy.num_buffered * element * logits
    return held
