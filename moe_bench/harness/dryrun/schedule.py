"""How many micro batches show what a step does, and how their totals become those of the whole step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moe_bench.harness.batches import MicroBatch
from moe_bench.harness.dryrun.places import Phase
from moe_bench.harness.loopback import Ledger, LedgerKey, Traffic
from moe_bench.spec.recipe import Recipe

PER_MICRO_BATCH = frozenset({Phase.FORWARD, Phase.RECOMPUTE, Phase.BACKWARD, Phase.PIPELINE})
"""Phases that every micro batch goes through alike; the others come once per step."""
SYNCS = frozenset({Phase.GRADIENT_SYNC, Phase.PARAMETER_SYNC})
"""Phases that Megatron-FSDP, unlike DDP, goes through in micro batches too, though not in all alike."""


def num_micro_batches_to_run(recipe: Recipe) -> int:
    """The fewest micro batches that bring every rank to its steady state, at most those of the recipe.

    One after the other (no pipeline): 2, so that one follows another; 3 where the forward pass of one runs
    beside the backward pass of another. 1F1B: PP, as many as are ever in flight, at least 2. Interleaved:
    three groups of PP (or of `micro_batch_group_size`), as the first fills the pipeline, the second is in
    flight with it and the third is the first to alternate. Megatron-FSDP: 3, as the first finds weights that
    were gathered before the step and the last may reduce what the others have added up.
    """
    parallel = recipe.parallel
    if parallel.virtual_pipeline > 1:
        wanted = 3 * max(parallel.pipeline, parallel.micro_batch_group_size)
    elif recipe.overlap.expert_parallel or parallel.data_sharding == "megatron_fsdp":
        wanted = max(parallel.pipeline, 3)
    else:
        wanted = max(parallel.pipeline, 2)
    return min(wanted, recipe.num_micro_batches)


def over_the_step(count: int, phase: Phase, *, num_run: int, num_micro_batches: int) -> int:
    """A total of `num_run` micro batches as that of the whole step: in proportion, or once per step."""
    if phase not in PER_MICRO_BATCH:
        return count
    total, remainder = divmod(count * num_micro_batches, num_run)
    if remainder:
        raise ValueError(f"{phase}: {count} does not divide over the {num_run} micro batches that were run")
    return total


class WatchedBatches(list[MicroBatch]):
    """The micro batches of a step, and what a ledger stood at when the schedule took each."""

    def __init__(self, batches: Sequence[MicroBatch], ledger: Ledger) -> None:
        super().__init__(batches)
        self._ledger = ledger
        self._before: list[dict[LedgerKey, Traffic]] = []

    def __iter__(self) -> Iterator[MicroBatch]:
        for batch in super().__iter__():
            self._before.append(self._ledger.copied())
            yield batch

    def with_more(self, key: LedgerKey, line: Traffic, *, num_more: int) -> Traffic:
        """A line of the step with so many more micro batches like the last but one."""
        if not num_more:
            return line
        nothing = Traffic()
        start, end = (lines.get(key, nothing) for lines in self._before[-2:])
        return Traffic(
            num_calls=line.num_calls + num_more * (end.num_calls - start.num_calls),
            num_bytes=line.num_bytes + num_more * (end.num_bytes - start.num_bytes),
        )
