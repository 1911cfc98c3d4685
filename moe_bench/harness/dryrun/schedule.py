"""How the totals of a few micro batches become those of a whole step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moe_bench.harness.batches import MicroBatch
from moe_bench.harness.dryrun.places import Phase
from moe_bench.harness.loopback import Ledger, LedgerKey, Traffic

PER_MICRO_BATCH = frozenset({Phase.FORWARD, Phase.RECOMPUTE, Phase.BACKWARD, Phase.PIPELINE})
"""Phases that every micro batch goes through alike; the others come once per step."""
SYNCS = frozenset({Phase.GRADIENT_SYNC, Phase.PARAMETER_SYNC})
"""Phases that Megatron-FSDP, unlike DDP, goes through in micro batches too, though not in all alike."""


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
