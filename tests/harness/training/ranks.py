"""What a rank of a training run says; apart from the tests, so that a rank imports little."""

from __future__ import annotations

from pathlib import Path

from moe_bench.harness.training.program import Start, train_rank
from moe_bench.harness.workers import Seat
from moe_bench.results.training_health import HealthLine
from moe_bench.results.training_log import LogLine
from moe_bench.spec.training import TrainingJob


def ignored(line: HealthLine) -> None:
    """Of the experts nothing is asked."""


def lines_of_rank(job: TrainingJob, folder: Path, start: Start, seat: Seat) -> list[LogLine]:
    """Of its steps; only one rank says anything."""
    lines: list[LogLine] = []
    train_rank(job, folder, start, seat.rendezvous, lines.append, ignored, listen_fd=seat.listen_fd)
    return lines
