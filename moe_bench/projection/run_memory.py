"""Device memory of a published run, by the closed form of the engine that ran it, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass

from moe_bench.analysis.chunk_memory import ModelMemory
from moe_bench.analysis.dispatch_buffers import dispatch_buffer_bytes
from moe_bench.analysis.memory import CONTEXT_BYTES, RankMemory, memory_fit, needed_bytes
from moe_bench.analysis.memory_verdict import MemoryVerdict, bounds_verdict
from moe_bench.errors import BadInputError
from moe_bench.projection.load import lognormal, popularity_load, sigma_of_gini
from moe_bench.projection.row_inference import Configured, InferredRun
from moe_bench.projection.row_memory_rules import OPERATOR_CHECKPOINTING
from moe_bench.projection.row_stack import Engine
from moe_bench.projection.torch_memory import Checkpointing, TorchPolicy, torch_memory
from moe_bench.spec.recipe import Recipe

CACHING_FRACTION = 0.09
"""Reserved beyond allocated memory without expandable segments (analysis/memory.py), which torchtitan's and
Automodel's published runs do not set."""
_TORCHTITAN_LOSS_BYTES = 12
"""Per logit while torch's cross entropy runs backward on FP32 logits: the logarithms of probabilities, the
gradient that nll_loss fills, and their own. Compiling the loss saves none of it: the printed peaks of
Llama3.1-8B at 32,768 tokens, which are mostly loss, leave more."""
_AUTOMODEL_LOSS_BYTES = 10
"""Per logit: BF16 logits, their FP32 copy and the logarithms of probabilities (components/loss/masked_ce.py).
Inferred: three printed peaks that are mostly loss leave 9 to 10, where torch's backward pass takes 12."""


TRACED_GINI = 0.38
"""Highest inequality of experts' loads in traces on real text (arXiv:2605.20982)."""
_RESHARDING = ("nemotron_3_super", "nemotron_3_ultra")
"""Models whose benchmark of Automodel sets `reshard_after_forward`."""
_ROUTED_TENSORS = ("expert_input", "expert_up", "expert_hidden")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunMemory:
    """The fullest pipeline rank of one run."""

    held_bytes: int
    """What the closed form counts: allocated memory."""
    reserved_bytes: int
    """What a caching allocator makes of it, without the CUDA context."""
    needed_bytes: int
    """With the margins for fragmentation, context and NCCL."""
    usable_bytes: int
    pipeline_rank: int
    peak_at: str

    @property
    def verdict(self) -> MemoryVerdict:
        """Whether the run fits its GPU."""
        return bounds_verdict(self.held_bytes, self.needed_bytes, self.usable_bytes)


def run_memory(run: InferredRun | Configured) -> RunMemory:
    """Memory of `run`. Raises BadInputError for a recipe that the closed form cannot take.

    What is needed at most is what is held with the margins of analysis/memory.py, the dispatcher's buffers,
    what CUDA graphs of whole iterations keep twice, and what natural routing brings to the busiest rank.
    """
    recipe = run.recipe
    gpu = recipe.system.gpu
    if gpu is None:
        raise BadInputError(
            f"{run.row.id}: system {recipe.system.key} has no GPU whose memory could be filled; choose one "
            "of recipes/systems that has"
        )
    if run.stack.engine in (Engine.TORCHTITAN, Engine.AUTOMODEL):
        fullest = max(torch_memory(recipe, torch_policy(run)), key=lambda rank: rank.total_bytes)
        held, reserved = fullest.total_bytes, round((1 + CACHING_FRACTION) * fullest.total_bytes)
        rank, peak_at, above = fullest.pipeline_rank, fullest.peak_at, 0
    else:
        worst = memory_fit(recipe).worst
        held, reserved = worst.total_bytes, needed_bytes(worst) - CONTEXT_BYTES
        rank, peak_at = worst.pipeline_rank, worst.peak_at
        above = _graph_bytes(recipe, worst) + _imbalance_bytes(recipe, worst)
    return RunMemory(
        held_bytes=held,
        reserved_bytes=reserved,
        needed_bytes=reserved + CONTEXT_BYTES + _buffer_bytes(recipe) + above,
        usable_bytes=gpu.usable_bytes,
        pipeline_rank=rank,
        peak_at=peak_at,
    )


def _buffer_bytes(recipe: Recipe) -> int:
    """The dispatcher's, outside of torch's allocator; what no source sizes is left out."""
    if recipe.parallel.expert == 1:
        return 0
    return dispatch_buffer_bytes(recipe) or 0


def _graph_bytes(recipe: Recipe, worst: RankMemory) -> int:
    """What the iterations before the capture leave in the allocator, of no use to the graph's private pool.

    NVIDIA-NeMo/Megatron-Bridge #4587: 60.9 GB inactive after the first iteration, where the next allocation
    fails; #5356: no size of the model fits a B200 with one graph per iteration.
    """
    if recipe.cuda_graphs.implementation != "full_iteration":
        return 0
    return worst.activations_bytes + worst.recomputed_bytes + worst.backward_bytes


def _imbalance_bytes(recipe: Recipe, worst: RankMemory) -> int:
    """Of natural routing without a capacity: experts' kept tensors on the busiest rank, beyond the mean.

    As unequal as traces of inference on real text are at most (projection/load.py); the busiest rank is taken
    to be the same in every layer.
    """
    moe = recipe.model.moe
    if moe is None or recipe.routing.mode != "natural" or recipe.token_drop is not None:
        return 0
    load = popularity_load(recipe, lognormal(moe.num_experts, sigma_of_gini(TRACED_GINI)))
    layer = ModelMemory(recipe).layer(is_moe=True, is_recomputed=recipe.recompute.granularity == "full")
    routed = sum(layer.kept.get(name, 0) for name in _ROUTED_TENSORS)
    return round((load - 1) * worst.activations_bytes * routed / layer.kept_bytes)


def torch_policy(run: InferredRun | Configured) -> TorchPolicy:
    """How torchtitan or Automodel shards `run`.

    torchtitan trains FP32 weights with fused AdamW and keeps weights whole in pipelines ("default" of
    fsdp_reshard_after_forward). Automodel trains BF16 weights with torch's Adam, whose step makes a tensor
    per weight; its expert models keep weights whole, but for the largest Nemotrons, and defer gradients, its
    Llama benchmark does neither (examples/llm_benchmark).
    """
    recipe = run.recipe
    num_chunks = None if run.stack.pipeline_schedule is None else 2 * recipe.parallel.pipeline
    if run.stack.engine is Engine.TORCHTITAN:
        return TorchPolicy(
            weight_bytes=4,
            moment_bytes=8,
            step_bytes=0,
            keeps_weights_whole=recipe.parallel.pipeline > 1,
            defers_gradients=recipe.parallel.pipeline > 1,
            loss_bytes=_TORCHTITAN_LOSS_BYTES,
            checkpointing=_checkpointing(run),
            num_chunks_in_flight=num_chunks,
        )
    is_moe = recipe.model.moe is not None
    return TorchPolicy(
        weight_bytes=2,
        moment_bytes=4,
        step_bytes=2,
        keeps_weights_whole=is_moe and not recipe.model.key.startswith(_RESHARDING),
        defers_gradients=is_moe,
        loss_bytes=_AUTOMODEL_LOSS_BYTES,
        checkpointing=_checkpointing(run),
        num_chunks_in_flight=num_chunks,
    )


def _checkpointing(run: InferredRun | Configured) -> Checkpointing:
    if any(assumption.rule == OPERATOR_CHECKPOINTING for assumption in run.assumptions):
        return Checkpointing.OPERATORS
    return Checkpointing.NONE if run.recipe.recompute.granularity == "none" else Checkpointing.BLOCKS
