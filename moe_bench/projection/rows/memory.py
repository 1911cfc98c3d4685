"""Device memory of a published run, by the closed form of the engine that ran it, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass

from moe_bench.analysis.chunk_memory import ModelMemory
from moe_bench.analysis.memory import (
    CONTEXT_BYTES,
    FRAGMENTATION_FRACTION,
    memory_fit,
    needed_bytes,
    usable_bytes,
)
from moe_bench.analysis.memory_verdict import MemoryVerdict, bounds_verdict
from moe_bench.analysis.outside_memory import buffer_bytes
from moe_bench.projection.rows.inference import Configured, InferredRun
from moe_bench.projection.rows.memory_rules import OPERATOR_CHECKPOINTING
from moe_bench.projection.rows.stack import Engine
from moe_bench.projection.rows.torch_memory import Checkpointing, TorchPolicy, torch_memory
from moe_bench.projection.rows.torch_stages import StagePolicy
from moe_bench.projection.rows.untrained import untrained_loads
from moe_bench.projection.work.load import lognormal, sigma_of_gini
from moe_bench.spec.recipe import Recipe

CACHING_FRACTION = 0.09
"""Reserved beyond allocated memory without expandable segments (analysis/memory.py), which most benchmarks of
Automodel do not set; torchtitan's run_train.sh does."""
_TORCHTITAN_LOSS_BYTES = 12
"""Per logit while torch's cross entropy runs backward on FP32 logits: the logarithms of probabilities, the
gradient that nll_loss fills, and their own. Compiling the loss saves none of it: the printed peaks of
Llama3.1-8B at 32,768 tokens, which are mostly loss, leave more."""
_LOSS_PARALLEL_BYTES = 16
"""The same over tensor ranks: logarithms, a gradient of zeros, probabilities, and their sum or its product
(torch distributed/tensor/parallel/loss.py, _nll_loss_and_log_softmax_backward)."""
_BF16_LOSS_BYTES = 8
"""Logits, logarithms and both gradients in BF16: `fp32_upcast: false` of all expert models in Automodel's
examples/llm_benchmark (components/loss/masked_ce.py)."""
_UPCAST_LOSS_BYTES = 14
"""BF16 logits, and in FP32 the logarithms and both gradients: its default."""
_MXFP8_COPIES_BYTES = 2 * (1 + 1 / 32)
"""Row-wise and column-wise copies of a weight with their scales, which Transformer Engine keeps from a step's
first micro batch to its last (Automodel's components/models/common/utils.py, _patch_te_modules)."""
NATURAL_CACHING_FRACTION = 0.11
"""The most that published runs with natural routing and no capacity reserve beyond what they allocate, while
rows of experts change in number with every pass: 72.4 to 65.2 GiB (Megatron-Bridge 067f987df, card of
gemma-4-26b-a4b-it)."""
TRACED_GINI = 0.38
"""Highest inequality of experts' loads in traces on real text (arXiv:2605.20982)."""
_RESHARDING = ("nemotron_3_super", "nemotron_3_ultra")
"""Models whose benchmark of Automodel sets `reshard_after_forward`."""


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
    """Memory of `run` on its engine. Raises BadInputError for a recipe that the closed form cannot take."""
    if run.stack.engine not in (Engine.TORCHTITAN, Engine.AUTOMODEL):
        return recipe_memory(run.recipe)
    recipe = run.recipe
    moments = torch_memory(recipe, torch_policy(run))
    fullest = max(moments, key=lambda moment: moment.total_bytes)
    is_expandable = run.stack.engine is Engine.TORCHTITAN
    fraction = FRAGMENTATION_FRACTION if is_expandable else CACHING_FRACTION
    reserved = round((1 + fraction) * max(moment.cached_bytes for moment in moments))
    return RunMemory(
        held_bytes=fullest.total_bytes,
        reserved_bytes=reserved,
        needed_bytes=reserved + CONTEXT_BYTES + buffer_bytes(recipe),
        usable_bytes=usable_bytes(recipe),
        pipeline_rank=fullest.pipeline_rank,
        peak_at=fullest.peak_at,
    )


def recipe_memory(recipe: Recipe) -> RunMemory:
    """Memory of `recipe` on Megatron-Core. Raises BadInputError for a system without GPU.

    What is needed at most is what is held with the margins of analysis/memory.py, or, where natural routing
    drops no token, what an untrained router leaves to the busiest rank.
    """
    worst = memory_fit(recipe, load=_least_load(recipe)).worst
    return RunMemory(
        held_bytes=worst.total_bytes,
        reserved_bytes=needed_bytes(worst) - CONTEXT_BYTES - worst.outside_bytes,
        needed_bytes=max(needed_bytes(worst), _untrained_bytes(recipe)),
        usable_bytes=usable_bytes(recipe),
        pipeline_rank=worst.pipeline_rank,
        peak_at=worst.peak_at,
    )


def _least_load(recipe: Recipe) -> float:
    """What the busiest rank receives for its experts at the least, over the balanced mean.

    A capacity that is not padded drops what is beyond it, and experts that are less popular receive less; the
    most unequal trace of inference on real text (work/load.py) says how much.
    """
    moe, drop = recipe.model.moe, recipe.token_drop
    if moe is None or drop is None or recipe.routing.mode != "natural" or drop.pad_to_capacity:
        return 1.0
    popularity = lognormal(moe.num_experts, sigma_of_gini(TRACED_GINI))
    return float((popularity / popularity.mean()).clip(max=drop.capacity_factor).mean())


def _untrained_bytes(recipe: Recipe) -> int:
    """With margins, what the first steps of natural routing without a capacity may need; 0 otherwise.

    The layer at work is a rank's most loaded one.
    """
    moe = recipe.model.moe
    if moe is None or recipe.routing.mode != "natural" or recipe.token_drop is not None:
        return 0
    loads = untrained_loads(recipe, moe)
    worst = memory_fit(recipe, load=loads.stage_ratio).worst
    full = recipe.recompute.granularity == "full"
    mean, most = (
        ModelMemory(recipe, load=load).layer(is_moe=True, is_recomputed=full).forward.total_bytes
        for load in (loads.stage_ratio, loads.layer_ratio)
    )
    held = worst.total_bytes + most - mean
    return round((1 + NATURAL_CACHING_FRACTION) * held) + CONTEXT_BYTES + worst.outside_bytes


def torch_policy(run: InferredRun | Configured) -> TorchPolicy:
    """How torchtitan or Automodel shards `run`.

    torchtitan trains FP32 weights with fused AdamW and keeps weights whole in pipelines ("default" of
    fsdp_reshard_after_forward). Automodel trains BF16 weights with torch's Adam, whose step makes a tensor
    per weight; its expert models keep weights whole, but for the largest Nemotrons, and defer gradients, its
    Llama benchmark does neither (examples/llm_benchmark).
    """
    recipe, stack = run.recipe, run.stack
    stages = StagePolicy(
        num_buffered=_num_buffered(run),
        keeps_outputs=stack.is_before(2025, 6),
        # torchtitan #1922 of 2025-10-22 asks for none
        keeps_logits=stack.engine is Engine.AUTOMODEL or stack.is_before(2025, 11),
        num_chunks_in_flight=None if stack.pipeline_schedule is None else 2 * recipe.parallel.pipeline,
    )
    if stack.engine is Engine.TORCHTITAN:
        return TorchPolicy(
            weight_bytes=4,
            moment_bytes=8,
            step_bytes=0,
            keeps_weights_whole=recipe.parallel.pipeline > 1,
            defers_gradients=recipe.parallel.pipeline > 1,
            expert_gradient_bytes=4,
            expert_copy_bytes=0,
            loss_bytes=_LOSS_PARALLEL_BYTES if recipe.parallel.tensor > 1 else _TORCHTITAN_LOSS_BYTES,
            checkpointing=_checkpointing(run),
            is_compiled="compile" in (run.row.other or ""),
            gathers_keys=True,
            stages=stages,
        )
    is_moe = recipe.model.moe is not None
    return TorchPolicy(
        weight_bytes=2,
        moment_bytes=4,
        step_bytes=2,
        keeps_weights_whole=is_moe and not recipe.model.key.startswith(_RESHARDING),
        defers_gradients=is_moe,
        # before #1896 of 2026-06-09 experts were sharded without a type to reduce in
        expert_gradient_bytes=2 if stack.is_before(2026, 7) else 4,
        expert_copy_bytes=_MXFP8_COPIES_BYTES if run.row.experts_backend == "te_mxfp8" else 0,
        loss_bytes=_BF16_LOSS_BYTES if is_moe else _UPCAST_LOSS_BYTES,
        checkpointing=_checkpointing(run),
        is_compiled=False,
        gathers_keys=False,
        stages=stages,
    )


def _num_buffered(run: InferredRun | Configured) -> int:
    """Micro batches of one local batch, which torch's pipelines run to its end."""
    recipe, local_batch = run.recipe, run.row.local_batch
    num_local = recipe.num_micro_batches if local_batch is None else local_batch // recipe.micro_batch_size
    return max(1, min(num_local, recipe.num_micro_batches))


def _checkpointing(run: InferredRun | Configured) -> Checkpointing:
    if any(assumption.rule == OPERATOR_CHECKPOINTING for assumption in run.assumptions):
        return Checkpointing.OPERATORS
    return Checkpointing.NONE if run.recipe.recompute.granularity == "none" else Checkpointing.BLOCKS
