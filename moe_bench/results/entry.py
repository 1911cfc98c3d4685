"""One record in a list of many: what it is called, what ran, where, when, and how fast it was."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moe_bench.results.summary import RunSummary, Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What a list shows and a selection asks for, without the recipe itself."""

    path: Path
    model: str
    recipe: str
    """As asked."""
    scale: str
    modified: tuple[str, ...]
    system: str
    """That of the recipe as run; `cpu_host` of a smoke run."""
    precision: str
    num_ranks: int
    started_at: str
    commit: str
    job_id: str
    repeat: int
    status: Status
    step_time_s: float
    tokens_per_s_per_gpu: float
    flops_per_s_per_gpu: float

    @property
    def id(self) -> str:
        """What `results show` takes: the file's name without its ending."""
        return self.path.stem

    @property
    def job_number(self) -> str:
        """The scheduler's number of the job, or the number of the process."""
        return self.job_id.removeprefix("job").removeprefix("pid")


def entry_of(summary: RunSummary, path: Path) -> Entry:
    """The entry of a run whose record lies in `path`."""
    recipe, metrics = summary.plan.recipe, summary.metrics
    return Entry(
        path=path,
        model=recipe.model.key,
        recipe=summary.plan.asked,
        scale=summary.plan.scale,
        modified=summary.plan.modified,
        system=recipe.system.key,
        precision=recipe.precision,
        num_ranks=summary.num_ranks,
        started_at=summary.started_at,
        commit=summary.commit,
        job_id=summary.job_id,
        repeat=summary.repeat,
        status=summary.status,
        step_time_s=metrics.step_time_s,
        tokens_per_s_per_gpu=metrics.tokens_per_s_per_gpu,
        flops_per_s_per_gpu=metrics.flops_per_s_per_gpu,
    )
