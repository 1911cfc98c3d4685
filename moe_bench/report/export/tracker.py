"""What every experiment tracker is given of a record, and how one that is missing is named."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec

from moe_bench.errors import MissingRequirementError
from moe_bench.results.record import Record
from moe_bench.results.summary import summary_of


def require_installed(module: str, *, package: str, name: str) -> None:
    """Raise MissingRequirementError where the package of a tracker is not here; nothing is imported."""
    if find_spec(module) is None:
        raise MissingRequirementError(f"{name} is not installed here; pip install {package}")


def settings(record: Record) -> dict[str, str]:
    """What ran: every field of the recipe as run, kernels, GPUs and software, by dotted name."""
    summary = summary_of(record)
    named = {
        "recipe": summary.plan.asked,
        "modified": " ".join(summary.plan.modified) or "none",
        "job": summary.job_id,
        "started_at": summary.started_at,
    }
    return {**named, **summary.facts, **summary.software}


def outcome(record: Record) -> dict[str, float]:
    """The numbers of the run as tables show them, units in the names, without those that cannot exist."""
    metrics = dataclasses.asdict(summary_of(record).metrics)
    return {name: float(value) for name, value in metrics.items() if type(value) in (int, float)}
