"""One rank of a job, run for real and alone, with loopback groups in place of the others."""

from __future__ import annotations

import dataclasses
from collections import Counter

from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

from moe_bench.harness.loopback import Ledger, loopback_groups
from moe_bench.harness.mcore_config import MegatronArguments
from moe_bench.harness.rank import RankReport, machine, measured
from moe_bench.harness.settings import settings_of
from moe_bench.harness.trainer import StepReport, Watch
from moe_bench.spec.rendezvous import Rendezvous

RANK = 0
_OUTSIDE = "outside"
_COUNTED = "counted"


class _CountedStep:
    """Tells transfers of the first timed step from all others."""

    def __init__(self, watch: Watch, *, counted_step: int) -> None:
        self._watch, self._counted_step = watch, counted_step
        self._phase = _OUTSIDE
        self.ledger = Ledger(lambda: (self._phase, ""))

    def watch(self) -> Watch:
        """The given watch, which now tells this object of steps as well."""
        return Watch(now_s=self._watch.now_s, on_step=self._on_step, on_report=self._on_report)

    def _on_step(self, step: int) -> None:
        self._phase = _COUNTED if step == self._counted_step else _OUTSIDE
        self._watch.on_step(step)

    def _on_report(self, report: StepReport) -> None:
        self._phase = _OUTSIDE
        self._watch.on_report(report)

    def bytes_by_transfer(self) -> dict[str, int]:
        """Bytes of the counted step by `<collective> <group>`, the reduction of the loss included."""
        total = Counter[str]()
        for key, line in sorted(self.ledger.lines.items()):
            if key.phase == _COUNTED:
                total[f"{key.op} {key.group}"] += line.num_bytes
        return dict(total)


def run_slice_rank(
    arguments: MegatronArguments, rendezvous: Rendezvous, watch: Watch
) -> tuple[RankReport, ...]:
    """Train the warm-up and timed steps of `arguments`, a slice's, as its first rank; the one report.

    `rendezvous` is that of this process, the only one. Raises MeasurementError where no number may come of
    it, MissingRequirementError where something asked for is not here.
    """
    settings = settings_of(arguments)
    step = _CountedStep(watch, counted_step=settings.num_warmup_steps + 1)
    with (
        machine(settings, rendezvous) as (device, applied),
        loopback_groups(
            world_size=settings.world_size,
            rank=RANK,
            sizes=arguments.parallel_state,
            on_transfer=step.ledger.record,
        ),
    ):
        try:
            report = measured(
                arguments, settings, rendezvous, step.watch(), applied, device=device, is_alone=True
            )
        finally:
            destroy_moe_metrics_tracker()
    return (dataclasses.replace(report, stood_in_bytes=step.bytes_by_transfer()),)
