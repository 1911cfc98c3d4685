"""Weak and strong scaling: throughput per GPU at every size over that at the smallest, with its interval."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING

from moe_bench.analysis.equivalence import ratio_between
from moe_bench.report.published import row_sizes
from moe_bench.report.recipe_list import layout_label
from moe_bench.results.likeness import RunSet, is_covered, run_sets
from moe_bench.results.metrics import mean_tokens_per_s_per_gpu
from moe_bench.results.published import PublishedRow, model_key
from moe_bench.results.renormalised import Basis, renormalised
from moe_bench.results.row_recipe import PRECISIONS
from moe_bench.results.summary import Run
from moe_bench.spec.load import UnknownNameError
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.recipe import Recipe
from moe_bench.spec.scale import Plan

if TYPE_CHECKING:
    from moe_bench.launch.jobs import JobReport

EFFICIENCY = "efficiency = tokens/s/GPU over that of the smallest size of the same curve"
"""One definition serves both: with equal tokens per GPU it is T_0 / T, with equal tokens N_0 T_0 / (N T)."""

_FREE_FACTS = ("parallel", "num_ranks", "global_batch_size", "micro_batch_size", "steps")
"""What may differ between the runs of one family: layout, batch, and how long they are timed."""
_NAMES = ("variant", "reproduces", "differences", "origin")
"""What a recipe is called and where it comes from; the members of a family differ in it."""


class Kind(StrEnum):
    """Where a number comes from; numbers of different kinds are never joined."""

    MEASURED = "measured"
    PUBLISHED = "published"
    PROJECTED = "projected"


class Mode(StrEnum):
    """What stays equal while GPUs are added."""

    WEAK = "weak"
    """Sequences per GPU and step."""
    STRONG = "strong"
    """Sequences per step."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Subject:
    """What is scaled; curves of one subject can be read side by side."""

    model: str
    """Folder name under `recipes/`, or what a printed name would be there."""
    system: str
    """As sources print it: `H100`, `GB300`; `CPU` for a machine without GPUs."""
    precision: str
    """As sources print it: `BF16`, `MXFP8`."""
    seq_len: int

    def __str__(self) -> str:
        return f"{self.model}, {self.system}, {self.precision}, {self.seq_len:,} tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One recipe or row at one size, whether or not it has a number."""

    subject: Subject
    label: str
    """Recipe or row."""
    num_gpus: int
    global_batch_size: int
    layout: str
    recipe_family: str = ""
    """What the members of a family were asked for, whatever became of them; empty where nobody asked."""

    @property
    def per_gpu_batch(self) -> Fraction:
        """Sequences per GPU and step."""
        return Fraction(self.global_batch_size, self.num_gpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingPoint(Point):
    """The throughput of one recipe or row at one size."""

    kind: Kind
    family: str
    """Points of equal kind, subject and family can form a curve."""
    tokens_per_s_per_gpu: float
    runs_s: tuple[tuple[float, ...], ...] = ()
    """GPU-seconds per token of each steady step of every run; empty where only the number is known."""
    remark: str = ""
    """`from MFU`, where the source does not print a throughput."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MissingPoint(Point):
    """A run that was asked for and left no number: it failed, ran out of time or memory, or has not ended."""

    reason: str
    """What became of the newest of them."""
    num_jobs: int = 1
    """Of this recipe and size that left no number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """One point beside the reference of its curve."""

    point: ScalingPoint
    efficiency_ratio: float
    """Above 1 where the larger size is faster per GPU."""
    low_ratio: float | None
    high_ratio: float | None
    """Ends of the 95 % interval; None for the reference, and where there are no steps to take one from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """The points of one family that grow in one mode, by size; the first is the reference."""

    mode: Mode
    kind: Kind
    subject: Subject
    name: str
    efficiencies: tuple[Efficiency, ...]
    missing: tuple[MissingPoint, ...] = ()
    """Sizes of the same family that have no number, with the reason; never at a size that has one."""
    lost_repeats: tuple[MissingPoint, ...] = ()
    """Runs of the same family that left no number, at sizes that have one from others."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of GPUs, those without a number included, in rising order."""
        points: list[Point] = [*(one.point for one in self.efficiencies), *self.missing]
        return tuple(sorted({point.num_gpus for point in points}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """The curves that results and rows make, and the families that make none."""

    curves: tuple[Curve, ...]
    unscaled: tuple[str, ...]
    """Families of several sizes whose batch neither stays nor grows with the GPUs."""
    missing: tuple[MissingPoint, ...] = ()
    """Sizes without a number whose family has no curve: nothing of it was measured."""


def scaling_of(
    records: Iterable[Run],
    rows: Iterable[PublishedRow],
    models: Mapping[str, ModelSpec],
    *,
    projected: Iterable[ScalingPoint] = (),
    missing: Iterable[MissingPoint] = (),
    model: str | None = None,
) -> Scaling:
    """Every curve of one model, by folder or printed name, or of all; `models` as in `row_points`.

    Raises UnknownNameError where no record, row or projection is of `model`.
    """
    points = [*record_points(records), *projected, *row_points(rows, models)]
    without = list(missing)
    if model is not None:
        every: list[Point] = [*points, *without]
        known = sorted({point.subject.model for point in every})
        if model_key(model) not in known:
            raise UnknownNameError("model with results", model, known)
        points = [point for point in points if point.subject.model == model_key(model)]
        without = [point for point in without if point.subject.model == model_key(model)]
    return Scaling(
        curves=curves(points, without),
        unscaled=unscaled_families(points),
        missing=_families_without_number(points, without),
    )


def record_points(records: Iterable[Run]) -> tuple[ScalingPoint, ...]:
    """One point per set of like runs, which are repeats of each other; their geometric mean is its number."""
    return tuple(_run_set_point(one) for one in run_sets(records))


def _run_set_point(one: RunSet) -> ScalingPoint:
    plan = one.runs[0].plan
    recipe = plan.recipe
    runs_s = tuple(run.gpu_s_per_token for run in one.runs)
    fixed = {fact: text for fact, text in one.facts.items() if not is_covered(fact, _FREE_FACTS)}
    return ScalingPoint(
        kind=Kind.MEASURED,
        subject=recipe_subject(recipe),
        family=json.dumps([fixed, dict(one.software)], sort_keys=True),
        label=one.name,
        num_gpus=one.runs[0].num_ranks,
        global_batch_size=recipe.global_batch_size,
        layout=layout_label(recipe),
        tokens_per_s_per_gpu=mean_tokens_per_s_per_gpu(runs_s),
        runs_s=runs_s,
        recipe_family=_recipe_family(plan),
    )


def missing_points(jobs: Iterable[JobReport]) -> tuple[MissingPoint, ...]:
    """One point per recipe and size among `jobs`, newest first, that left no record, with the newest reason.

    A slice is one rank, and scales nothing.
    """
    found: dict[tuple[str, int, int], MissingPoint] = {}
    for job in jobs:
        if job.record is None and job.plan is not None and not job.plan.is_slice:
            reason = f"{job.state}: {job.reason}" if job.reason else str(job.state)
            point = missing_point(job.plan, reason)
            key = (point.recipe_family, point.num_gpus, point.global_batch_size)
            before = found.get(key)
            found[key] = point if before is None else replace(before, num_jobs=before.num_jobs + 1)
    return tuple(found.values())


def missing_point(plan: Plan, reason: str) -> MissingPoint:
    """The point of a run of `plan` that left no number, and why."""
    recipe = plan.recipe
    return MissingPoint(
        subject=recipe_subject(recipe),
        recipe_family=_recipe_family(plan),
        label=plan.asked if plan.scale == "full" else f"{plan.asked} ({plan.scale} scale)",
        num_gpus=recipe.parallel.num_gpus,
        global_batch_size=recipe.global_batch_size,
        layout=layout_label(recipe),
        reason=reason,
    )


def _recipe_family(plan: Plan) -> str:
    """What the runs of one family were asked for, whatever became of them."""
    recipe = plan.recipe.model_dump(mode="json", exclude={*_FREE_FACTS, *_NAMES})
    return json.dumps([plan.scale, recipe], sort_keys=True)


def recipe_subject(recipe: Recipe) -> Subject:
    """The subject of `recipe` in the words of published rows."""
    return Subject(
        model=recipe.model.key,
        system=recipe.system.key.partition("_")[0].upper(),
        precision=PRECISIONS.get(recipe.precision, recipe.precision.upper()),
        seq_len=recipe.seq_len,
    )


def row_points(rows: Iterable[PublishedRow], models: Mapping[str, ModelSpec]) -> tuple[ScalingPoint, ...]:
    """One point per row that trains a model, prints its sizes, and has a throughput.

    `models` are the architectures in `recipes/` by key. A throughput that follows from printed TFLOPs or MFU
    serves as well: what had to be assumed divides out between rows of one source.
    """
    found = (_row_point(row, models.get(model_key(row.model))) for row in rows if row.is_training)
    return tuple(point for point in found if point is not None)


def _row_point(row: PublishedRow, model: ModelSpec | None) -> ScalingPoint | None:
    ours = renormalised(row, model)
    if ours.tokens_per_s_per_gpu is None or ours.basis is None:
        return None
    if row.hardware is None or row.precision is None or row.seq_len is None:
        return None
    if row.num_gpus is None or row.gbs is None:
        return None
    family = row.series or f"{row.framework} {row.version or ''}".strip()
    return ScalingPoint(
        kind=Kind.PUBLISHED,
        subject=Subject(
            model=model_key(row.model), system=row.hardware, precision=row.precision, seq_len=row.seq_len
        ),
        family=family if row.num_layers is None else f"{family}, {row.num_layers} layers",
        label=row.id,
        num_gpus=row.num_gpus,
        global_batch_size=row.gbs,
        layout=row_sizes(row),
        tokens_per_s_per_gpu=ours.tokens_per_s_per_gpu,
        remark="" if ours.basis in (Basis.PRINTED, Basis.STEP_TIME) else f"from {ours.basis}",
    )


def curves(points: Iterable[ScalingPoint], missing: Iterable[MissingPoint] = ()) -> tuple[Curve, ...]:
    """Every weak and strong curve of two sizes or more, by subject, mode and kind.

    A size without a number counts as a size: of a family of which only one run ended well, that one is shown.
    """
    found, without = [], list(missing)
    for family in _families(points):
        for mode, batch in ((Mode.WEAK, "per_gpu_batch"), (Mode.STRONG, "global_batch_size")):
            by_batch = attrgetter(batch)
            for equal, members in groupby(sorted(family, key=by_batch), key=by_batch):
                ordered = sorted(members, key=lambda point: (point.num_gpus, -point.tokens_per_s_per_gpu))
                beside = [point for point in without if by_batch(point) == equal]
                curve = _curve(ordered, mode, beside)
                if len(curve.sizes) > 1:
                    found.append(curve)
    return tuple(sorted(found, key=lambda curve: (curve.subject, curve.mode, curve.kind, curve.name)))


def _families_without_number(
    points: Iterable[ScalingPoint], missing: Iterable[MissingPoint]
) -> tuple[MissingPoint, ...]:
    """Those of `missing` of whose family no run left a number, where several sizes of it were asked for."""
    measured = {point.recipe_family for point in points}
    open_points = [point for point in missing if point.recipe_family not in measured]
    sizes: dict[str, set[int]] = {}
    for point in open_points:
        sizes.setdefault(point.recipe_family, set()).add(point.num_gpus)
    return tuple(point for point in open_points if len(sizes[point.recipe_family]) > 1)


def unscaled_families(points: Iterable[ScalingPoint]) -> tuple[str, ...]:
    """Families of several sizes whose batch neither stays nor grows with the GPUs, by name."""
    return tuple(
        sorted(
            _name(family[0])
            for family in _families(points)
            if len({point.num_gpus for point in family}) > 1 and not curves(family)
        )
    )


def _families(points: Iterable[ScalingPoint]) -> list[list[ScalingPoint]]:
    families: dict[tuple[Kind, Subject, str], list[ScalingPoint]] = {}
    for point in points:
        families.setdefault((point.kind, point.subject, point.family), []).append(point)
    return list(families.values())


def _curve(points: Sequence[ScalingPoint], mode: Mode, missing: Iterable[MissingPoint]) -> Curve:
    """`points` by size, the fastest of each size first, and what of `missing` is of their family.

    The first point is the reference.
    """
    reference = points[0]
    sizes = {point.num_gpus for point in points}
    without = sorted(
        (point for point in missing if point.recipe_family == reference.recipe_family),
        key=lambda point: point.num_gpus,
    )
    return Curve(
        mode=mode,
        kind=reference.kind,
        subject=reference.subject,
        name=_name(reference),
        efficiencies=tuple(_efficiency(reference, point) for point in points),
        missing=tuple(point for point in without if point.num_gpus not in sizes),
        lost_repeats=tuple(point for point in without if point.num_gpus in sizes),
    )


def _name(reference: ScalingPoint) -> str:
    """What a curve is called: the series of published rows, else after its smallest size."""
    return reference.family if reference.kind is Kind.PUBLISHED else reference.label


def _efficiency(reference: ScalingPoint, point: ScalingPoint) -> Efficiency:
    """Throughput per GPU over the reference's, with the interval of analysis/equivalence.py."""
    ratio = point.tokens_per_s_per_gpu / reference.tokens_per_s_per_gpu
    interval = None
    if point is not reference and point.runs_s and reference.runs_s:
        interval = ratio_between(reference.runs_s, point.runs_s)
    return Efficiency(
        point=point,
        efficiency_ratio=ratio if interval is None else interval.estimate_ratio,
        low_ratio=None if interval is None else interval.low_ratio,
        high_ratio=None if interval is None else interval.high_ratio,
    )
