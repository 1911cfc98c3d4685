"""What the recipe as asked would hold that the derived one does not, and the other way round, term by term.

Each term is a difference of two closed forms of `moe_bench.analysis`, or a closed form of its own with its
source.
"""

from __future__ import annotations

from collections.abc import Iterator

from moe_bench.analysis.dispatch_buffers import dispatch_buffer_bytes
from moe_bench.analysis.memory import rank_memory
from moe_bench.harness.dryrun.outcome import Correction
from moe_bench.spec.recipe import KernelSpec, Recipe


def corrections(asked: Recipe, derived: Recipe, pipeline_rank: int) -> tuple[Correction, ...]:
    """All terms of one pipeline rank that are not zero, and those that nobody has a figure for."""
    terms = (
        *_states(asked, derived, pipeline_rank),
        *_beside_states(asked, derived, pipeline_rank),
        _dispatch_buffers(asked),
        *_without_figure(asked),
    )
    return tuple(term for term in terms if term.num_bytes != 0)


def _states(asked: Recipe, derived: Recipe, pipeline_rank: int) -> Iterator[Correction]:
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


def _beside_states(asked: Recipe, derived: Recipe, pipeline_rank: int) -> Iterator[Correction]:
    """From the derived recipe to the one asked for, one difference after the other, so that they add up."""
    kernels = asked.kernels
    separate = _without(kernels, "gradient_accumulation")
    maps = "router and permutation: the maps and scores that are kept"
    steps = (
        (maps, {"kernels": _without(derived.kernels, *_MAPPED)}),
        (
            "kernels: norms fused into projections, MLA's values unpadded",
            {"kernels": _without(separate, *_MAPPED)},
        ),
        (maps, {"kernels": separate}),
        ("weight gradients: added up in the GEMM, a placeholder per shape", {"kernels": kernels}),
        ("activations: inputs of products in FP8 or FP4", {"precision": asked.precision}),
        ("dispatch: tokens once per rank", {"dispatch": asked.dispatch}),
        ("context parallelism: nothing gathered", {"parallel": asked.parallel}),
    )
    added = dict.fromkeys((term for term, _ in steps), 0)
    before = _moving_bytes(derived, pipeline_rank)
    for term, change in steps:
        derived = derived.model_copy(update=change)
        after = _moving_bytes(derived, pipeline_rank)
        added[term] += after - before
        before = after
    for term, num_bytes in added.items():
        yield Correction(term=term, num_bytes=num_bytes, source=_SOURCES[term.partition(":")[0]])


_MAPPED = ("router", "permute")
"""Fusions that keep other maps and scores with Transformer Engine than ours do: taken off, then put on again,
so that they are a term of their own."""

_SOURCES = {
    "router and permutation": "analysis/layer_sizes.py; transformer_engine 2.20.2 pytorch/router.py",
    "kernels": "transformer_engine 2.20.2 pytorch/module/layernorm_linear.py, attention/; analysis/",
    "weight gradients": "transformer_engine 2.20.2 pytorch/module/base.py, get_dummy_wgrad",
    "activations": "analysis/expert_memory.py",
    "context parallelism": "transformer_engine 2.20.2 pytorch/attention, context_parallel.py",
    "dispatch": "analysis/layer_sizes.py expert_sizes; megatron-core 0.19.2 moe/token_dispatcher.py",
}


def _without(kernels: KernelSpec, *fusions: str) -> KernelSpec:
    less = kernels.fusions.model_copy(update=dict.fromkeys(fusions, False))
    return kernels.model_copy(update={"fusions": less})


def _moving_bytes(recipe: Recipe, pipeline_rank: int) -> int:
    memory = rank_memory(recipe, pipeline_rank)
    return memory.total_bytes - memory.states_bytes


def _dispatch_buffers(asked: Recipe) -> Correction:
    return Correction(
        term=f"dispatch: buffers of {asked.dispatch.dispatcher}",
        num_bytes=dispatch_buffer_bytes(asked),
        source="analysis/dispatch_buffers.py; deepseek-ai/DeepEP 94a9f8f6 csrc/config.hpp, csrc/hybrid_ep",
    )


def _without_figure(asked: Recipe) -> Iterator[Correction]:
    if asked.cuda_graphs.implementation != "none":
        yield Correction(
            term="CUDA graphs: their memory pools", num_bytes=None, source="torch.cuda.graph_pool_handle"
        )
    if asked.offload.num_activation_layers or asked.offload.modules or asked.offload.paged_stash:
        yield Correction(term="offloaded activations", num_bytes=None, source="megatron-core 0.19.2")
