"""Is our number the published one? Recipes that copy a row, the row, our runs, their ratio and a verdict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from moe_bench.analysis.equivalence import Claim, RatioInterval, claim, ratio_to_value, runs_to_decide
from moe_bench.results.contradictions import TOLERANCE_FRACTION
from moe_bench.results.likeness import RunSet, run_sets
from moe_bench.results.metrics import mean_tokens_per_s_per_gpu
from moe_bench.results.published import PublishedRow
from moe_bench.results.renormalised import Basis, renormalised
from moe_bench.results.row_recipe import disagreements
from moe_bench.results.summary import Run
from moe_bench.spec.recipe import Recipe


class Verdict(StrEnum):
    """What a full-scale result says of the published number."""

    REPRODUCED = "reproduced"
    FASTER = "faster"
    SLOWER = "slower"
    INCONCLUSIVE = "inconclusive"
    COMPARABLE = "comparable with differences"
    """The run was not what the row was; the ratio stands beside what differs and proves nothing."""
    NONE = "no verdict"
    """A slice or a smoke run, which is another recipe, or no published throughput."""
    NOT_RUN = "not run"


_VERDICTS = {
    Claim.SAME: Verdict.REPRODUCED,
    Claim.FASTER: Verdict.FASTER,
    Claim.SLOWER: Verdict.SLOWER,
    Claim.INCONCLUSIVE: Verdict.INCONCLUSIVE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A recipe's row on our scale."""

    recipe: str
    row_id: str
    tokens_per_s_per_gpu: float | None
    basis: Basis | None
    trust: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproduction:
    """One row beside one set of our runs, or beside none."""

    published: Published
    scale: str | None
    """None where nothing was run."""
    num_runs: int
    started_at: str | None
    """Of the newest run."""
    tokens_per_s_per_gpu: float | None
    """Ours, mean of the runs' medians; at node or smoke scale that of another, smaller recipe."""
    interval: RatioInterval | None
    """Ours over published; None at other scales than full."""
    verdict: Verdict
    because: tuple[str, ...]
    """What keeps the verdict from being more: differences, drift, or the number of runs that would decide."""
    projected_tokens_per_s_per_gpu: float | None
    """Of the recipe at full scale; never a verdict. None where nobody asked, or where it has no rates."""

    @property
    def projected_ratio(self) -> float | None:
        """Projected over published."""
        ours, theirs = self.projected_tokens_per_s_per_gpu, self.published.tokens_per_s_per_gpu
        return None if ours is None or theirs is None else ours / theirs


def reproductions(
    recipes: Iterable[Recipe],
    rows: Mapping[str, PublishedRow],
    runs: Iterable[Run],
    *,
    projected: Mapping[str, float] | None = None,
) -> tuple[Reproduction, ...]:
    """Every recipe that names a row, with each set of its runs, newest first; measured ones first.

    `projected` are tokens/s/GPU by recipe name, to stand beside them.

    A verdict is an equivalence: reproduced only if the whole 95 % interval of the ratio lies within 5 % of 1.
    The published number, printed once and without an interval, is taken as exact.
    """
    by_recipe: dict[str, list[RunSet]] = {}
    for one in run_sets(runs):
        by_recipe.setdefault(one.runs[0].plan.asked, []).append(one)
    found: list[Reproduction] = []
    for recipe in recipes:
        if recipe.reproduces is None:
            continue
        row = rows[recipe.reproduces]
        published = _published(recipe, row)
        sets = sorted(by_recipe.get(recipe.name, ()), key=_newest, reverse=True)
        found += [_reproduction(published, row, one) for one in sets] or [_not_run(published)]
    beside = projected or {}
    found = [replace(one, projected_tokens_per_s_per_gpu=beside.get(one.published.recipe)) for one in found]
    return tuple(sorted(found, key=_rank))


def verdict_counts(found: Sequence[Reproduction]) -> dict[Verdict, int]:
    """How many recipes have each verdict, by the newest full-scale set where there is one."""
    newest: dict[str, Verdict] = {}
    for one in found:
        newest.setdefault(one.published.recipe, one.verdict)
    return {verdict: list(newest.values()).count(verdict) for verdict in Verdict}


def _published(recipe: Recipe, row: PublishedRow) -> Published:
    ours = renormalised(row, recipe.model)
    return Published(
        recipe=recipe.name,
        row_id=row.id,
        tokens_per_s_per_gpu=ours.tokens_per_s_per_gpu,
        basis=ours.basis,
        trust=row.trust,
    )


def _not_run(published: Published) -> Reproduction:
    return Reproduction(
        published=published,
        scale=None,
        num_runs=0,
        started_at=None,
        tokens_per_s_per_gpu=None,
        interval=None,
        verdict=Verdict.NOT_RUN,
        because=(),
        projected_tokens_per_s_per_gpu=None,
    )


def _reproduction(published: Published, row: PublishedRow, one: RunSet) -> Reproduction:
    runs = [run.gpu_s_per_token for run in one.runs]
    plan = one.runs[0].plan
    interval = None
    verdict = Verdict.NONE
    because: tuple[str, ...] = (f"{plan.scale} scale is another recipe",)
    if plan.scale == "full" and published.tokens_per_s_per_gpu is None:
        because = ("the row prints no throughput",)
    elif plan.scale == "full" and published.tokens_per_s_per_gpu is not None:
        interval = ratio_to_value(runs, value_s=1 / published.tokens_per_s_per_gpu)
        verdict, because = _verdict(published, row, one, interval)
    return Reproduction(
        published=published,
        scale=str(plan.scale),
        num_runs=len(runs),
        started_at=_newest(one),
        tokens_per_s_per_gpu=mean_tokens_per_s_per_gpu(runs),
        interval=interval,
        verdict=verdict,
        because=because,
        projected_tokens_per_s_per_gpu=None,
    )


def _verdict(
    published: Published, row: PublishedRow, one: RunSet, interval: RatioInterval | None
) -> tuple[Verdict, tuple[str, ...]]:
    plan = one.runs[0].plan
    differences = [str(difference) for difference in disagreements(row, plan.recipe)]
    if published.basis is Basis.MFU:
        differences.append("the row prints an MFU alone; its throughput rests on an assumed count")
    if (row.inconsistency_fraction or 0) > TOLERANCE_FRACTION:
        differences.append("the row's throughput and step time contradict each other")
    if differences or plan.modified:
        return Verdict.COMPARABLE, (*plan.modified, *differences)
    if any(run.metrics.has_settled is False for run in one.runs):
        return Verdict.INCONCLUSIVE, ("the steps drift",)
    verdict = _VERDICTS[claim(interval)]
    if verdict is not Verdict.INCONCLUSIVE:
        return verdict, ()
    at_least = "" if interval is not None and interval.basis == "runs" else "≥"
    return verdict, (f"{at_least}{runs_to_decide(interval)} runs",)


def _newest(one: RunSet) -> str:
    return one.runs[-1].started_at


def _rank(one: Reproduction) -> int:
    """Full-scale results first, then smaller ones, then what was not run; stable within each."""
    return 2 if one.scale is None else 0 if one.scale == "full" else 1
