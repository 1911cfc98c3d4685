"""One rank of a job, run for real and alone, with loopback groups in place of the others."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

from megatron.core.distributed.fsdp.src.megatron_fsdp import param_and_grad_buffer
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

from moe_bench.harness.loopback import Ledger, loopback_groups
from moe_bench.harness.mcore_config import MegatronArguments
from moe_bench.harness.rank import RankReport, machine, measured
from moe_bench.harness.settings import settings_of
from moe_bench.harness.substitution import Substitution, substituted
from moe_bench.harness.timing import CudaMarks, DeviceMarks, HostClock
from moe_bench.harness.trainer import StepReport, Watch
from moe_bench.results.record import AloneSamples
from moe_bench.spec.profile import Profile
from moe_bench.spec.rendezvous import Rendezvous

_OUTSIDE = "outside"
_COUNTED = "counted"


def _unasked(tensor: object) -> None:
    """Megatron-FSDP asks whether all ranks' shards reach both ends of a weight; here all are this one's."""


class _Watched:
    """Marks where the schedule of each step begins and ends, and counts the transfers of one step."""

    def __init__(self, watch: Watch, marks: DeviceMarks, *, counted_step: int) -> None:
        self._watch, self._marks, self._counted_step = watch, marks, counted_step
        self._phase = _OUTSIDE
        self._is_in_schedule = False
        self._edges: list[Any] = []
        self._copies: list[tuple[Any, Any]] = []
        self.ledger = Ledger(lambda: (self._phase, ""))

    def watch(self) -> Watch:
        """The given watch, which now tells this object of steps as well."""
        return Watch(
            now_s=self._watch.now_s,
            on_step=self._on_step,
            on_report=self._on_report,
            on_schedule=self._on_schedule,
        )

    @contextlib.contextmanager
    def around_copies(self) -> Iterator[None]:
        """Time the copies of loopback groups within the schedule of the counted step."""
        if not (self._is_in_schedule and self._phase == _COUNTED):
            yield
            return
        start = self._marks.mark()
        yield
        self._copies.append((start, self._marks.mark()))

    def bytes_by_transfer(self) -> dict[str, int]:
        """Bytes of the counted step by `<collective> <group>`, the reduction of the loss included."""
        total = Counter[str]()
        for key, line in sorted(self.ledger.lines.items()):
            if key.phase == _COUNTED:
                total[f"{key.op} {key.group}"] += line.num_bytes
        return dict(total)

    def samples(self) -> AloneSamples:
        """Times of the schedule from the counted step on, and of the counted step's copies."""
        between_s, first = self._marks.between_s, 2 * (self._counted_step - 1)
        edges = zip(self._edges[first::2], self._edges[first + 1 :: 2], strict=True)
        return AloneSamples(
            schedule_times_s=tuple(between_s(start, end) for start, end in edges),
            stand_in_s=sum(between_s(start, end) for start, end in self._copies),
        )

    def _on_schedule(self) -> None:
        self._is_in_schedule = not self._is_in_schedule
        self._edges.append(self._marks.mark())

    def _on_step(self, step: int) -> None:
        self._phase = _COUNTED if step == self._counted_step else _OUTSIDE
        self._watch.on_step(step)

    def _on_report(self, report: StepReport) -> None:
        self._phase = _OUTSIDE
        self._watch.on_report(report)


def run_slice_rank(
    arguments: MegatronArguments,
    rendezvous: Rendezvous,
    watch: Watch,
    *,
    rank: int,
    profile: Profile | None = None,
) -> tuple[RankReport, ...]:
    """Train the warm-up and timed steps of `arguments`, a slice's, as its rank `rank`; the one report.

    `rendezvous` is that of this process, the only one. Raises MeasurementError where no number may come of
    it, MissingRequirementError where something asked for is not here.
    """
    settings = settings_of(arguments)
    with machine(settings, rendezvous) as (device, applied):
        watched = _Watched(
            watch,
            HostClock() if device == "cpu" else CudaMarks(),
            counted_step=settings.num_warmup_steps + 1,
        )
        with (
            substituted(Substitution(param_and_grad_buffer, "validate_uneven_dtensor", _unasked)),
            loopback_groups(
                world_size=settings.world_size,
                rank=rank,
                sizes=arguments.parallel_state,
                on_transfer=watched.ledger.record,
                around_copies=watched.around_copies,
            ),
        ):
            try:
                report = measured(
                    arguments,
                    settings,
                    rendezvous,
                    watched.watch(),
                    applied,
                    device=device,
                    is_alone=True,
                    profile=profile,
                )
            finally:
                destroy_moe_metrics_tracker()
    stood_in = watched.bytes_by_transfer()
    return (dataclasses.replace(report, stood_in_bytes=stood_in, alone=watched.samples()),)
