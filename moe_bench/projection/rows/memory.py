"""Device memory of a published run, by the closed form of the engine that ran it, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass

from moe_bench.analysis.memory import CONTEXT_BYTES, memory_fit, needed_bytes, usable_bytes
from moe_bench.analysis.memory_verdict import MemoryVerdict, bounds_verdict
from moe_bench.analysis.outside_memory import buffer_bytes
from moe_bench.projection.rows.inference import Configured, InferredRun
from moe_bench.projection.rows.memory_rules import OPERATOR_CHECKPOINTING
from moe_bench.projection.rows.stack import Engine
from moe_bench.projection.rows.torch_memory import Checkpointing, TorchPolicy, torch_memory
from moe_bench.projection.work.load import lognormal, popularity_load, sigma_of_gini
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
    fullest = max(torch_memory(recipe, torch_policy(run)), key=lambda rank: rank.total_bytes)
    reserved = round((1 + CACHING_FRACTION) * fullest.total_bytes)
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

    What is needed at most is what is held with the margins of analysis/memory.py, and what natural routing
    brings to the busiest rank.
    """
    least, most = _loads(recipe)
    worst = memory_fit(recipe, load=least).worst
    upper = worst if most == least else memory_fit(recipe, load=most).worst
    return RunMemory(
        held_bytes=worst.total_bytes,
        reserved_bytes=needed_bytes(worst) - CONTEXT_BYTES - worst.outside_bytes,
        needed_bytes=needed_bytes(upper),
        usable_bytes=usable_bytes(recipe),
        pipeline_rank=worst.pipeline_rank,
        peak_at=worst.peak_at,
    )


def _loads(recipe: Recipe) -> tuple[float, float]:
    """What the busiest rank receives for its experts over the balanced mean, at the least and at the most.

    Natural routing is at most as unequal as traces of inference on real text (work/load.py), in every
    layer: without a capacity a rank may receive more than its share, with one that is not padded less.
    """
    moe, drop = recipe.model.moe, recipe.token_drop
    if moe is None or recipe.routing.mode != "natural" or (drop is not None and drop.pad_to_capacity):
        return 1.0, 1.0
    popularity = lognormal(moe.num_experts, sigma_of_gini(TRACED_GINI))
    if drop is None:
        return 1.0, popularity_load(recipe, popularity)
    shares = popularity / popularity.mean()
    return float(shares.clip(max=drop.capacity_factor).mean()), 1.0


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
