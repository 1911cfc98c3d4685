"""Searches a space of layouts for the fastest that fit: bounds first, the full projection for what is left.

Exact as far as the projection goes: nothing is left out unless its lower bounds show that it can neither be
among the fastest nor be the fastest under a memory ceiling.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import numpy.typing as npt

from moe_bench.analysis.memory import (
    CONTEXT_BYTES,
    FRAGMENTATION_FRACTION,
    MemoryFit,
    memory_fit,
    rank_memory,
)
from moe_bench.analysis.memory_verdict import MemoryVerdict, verdict
from moe_bench.errors import BadInputError
from moe_bench.projection.constants import Constants
from moe_bench.projection.efficiency import Efficiency
from moe_bench.projection.pricing import Floats
from moe_bench.projection.search.bound import Family, StepBound
from moe_bench.projection.search.layout import Axis, Layout
from moe_bench.projection.search.legality import Legality
from moe_bench.projection.search.memory import MemoryBound
from moe_bench.projection.search.pareto import Front
from moe_bench.projection.search.space import Space
from moe_bench.projection.step import Projection, project
from moe_bench.spec.legality import RULES
from moe_bench.spec.recipe import Dispatcher, Recipe

_GIB = 1024**3
_ROUNDING = 1e-9
"""Relative: what the bounds' arithmetic may lose against that of what they bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One layout, projected in full."""

    indices: tuple[int, ...]
    """Of its values on the axes of the space."""
    layout: Layout
    projection: Projection
    memory: MemoryFit
    like: tuple[Dispatcher, ...] = ()
    """Other dispatchers for which this very layout is projected to the same time and memory."""
    num_variants: int = 0
    """Slower ones of its group that were projected: other divisions of the layers, other recomputation."""

    @property
    def recipe(self) -> Recipe:
        """The recipe that it makes."""
        return self.projection.recipe

    @property
    def peak_bytes(self) -> int:
        """What the fullest pipeline rank holds, without margins."""
        return peak_bytes(self.memory)

    @property
    def group(self) -> Hashable:
        """The same for layouts that a reader takes for one: virtual stages, division of the layers,
        recomputation and instances of the optimizer left aside, dispatchers by what they send.
        """
        layout = self.layout
        sends_once = layout.dispatcher not in ("alltoall", "allgather")
        sharding = layout.sharding.data_sharding, layout.sharding.fsdp_strategy
        kept = layout.widths, layout.context, layout.micro_batch_size, layout.overlaps_experts, layout.expert
        return (*kept, *sharding, layout.split.pipeline, "flex" if sends_once else layout.dispatcher)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What a search went through, and what it found."""

    space: Space
    num_legal: int
    refused: Counter[str]
    """Illegal layouts by the first rule that refuses them."""
    num_over: int
    """Legal ones whose lower bound of memory is above the usable memory."""
    num_slower: int
    """Legal ones that may fit, ruled out by their lower bound of time."""
    num_fitting: int
    num_too_close: int
    num_not_fitting: int
    """Of the others, by the full closed form of memory: fits, too close to say, does not fit."""
    num_simulated: int
    """Projected in full; dispatchers that price every operation and message alike count once."""
    ranked: tuple[Found, ...]
    """The fastest that fit, one of each group."""
    close: tuple[Found, ...]
    """Faster than the first of `ranked`, but too close to say whether they fit."""
    front: tuple[tuple[float, Found], ...]
    """Shares of the usable memory, and the fastest that stays below each; without those where none does."""

    @property
    def num_generated(self) -> int:
        """Layouts of the space, legal or not."""
        return self.space.num_layouts


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Legal layouts that may fit, as columns."""

    families: tuple[Family, ...]
    family: npt.NDArray[np.int64]
    split: npt.NDArray[np.int64]
    step_s: Floats
    memory_bytes: Floats
    num_legal: int
    leanest: tuple[int, ...]
    """The layout with the least lower bound of memory, whether it fits or not."""


def search(space: Space, *, num_wanted: int, constants: Constants | None = None) -> SearchResult:
    """The `num_wanted` fastest groups of layouts that fit, and the front of memory and speed.

    Raises BadInputError where no layout is legal, where none fits, and for a system without a GPU.
    """
    constants = constants or Constants()
    bound = StepBound(space, constants)
    legality = Legality(space)
    candidates = _candidates(space, legality, bound)
    examined = _Examined(space, num_wanted, constants, bound)
    for index in np.argsort(candidates.step_s, kind="stable"):
        at_least_bytes = candidates.memory_bytes[index]
        limit_s = examined.limit_s(at_least_bytes)
        if candidates.step_s[index] > limit_s:
            continue
        family, split = candidates.families[candidates.family[index]], int(candidates.split[index])
        within_s = limit_s * (1 + _ROUNDING)
        layers_s = float(bound.of_family(family)[split])
        if layers_s <= within_s and bound.with_traffic_s((*family, split), layers_s) <= within_s:
            examined.examine((*family, split))
    if not examined.fitting and not examined.close:
        raise BadInputError(_nothing_fits(space, candidates))
    fitting, close = _ordered(examined.fitting), _ordered(examined.close)
    best_s = fitting[0].projection.step_s if fitting else float("inf")
    return SearchResult(
        space=space,
        num_legal=candidates.num_legal,
        refused=legality.refused,
        num_over=candidates.num_legal - len(candidates.step_s),
        num_slower=len(candidates.step_s) - examined.num_examined,
        num_fitting=len(examined.fitting),
        num_too_close=len(examined.close),
        num_not_fitting=examined.num_not_fitting,
        num_simulated=examined.num_simulated,
        ranked=_grouped(fitting)[:num_wanted],
        close=tuple(one for one in _grouped(close)[:num_wanted] if one.projection.step_s < best_s),
        front=tuple(_front(fitting, examined.front)),
    )


class _Examined:
    """Layouts whose memory was computed in full, and whose step was projected where they may fit."""

    def __init__(self, space: Space, num_wanted: int, constants: Constants, bound: StepBound) -> None:
        gpu = space.base.system.gpu
        usable_bytes = gpu.usable_bytes if gpu is not None else 0
        self.front = Front(usable_bytes, num_wanted)
        self._close = Front(usable_bytes, num_wanted, ceilings=())
        self._most_fitting_bytes = (usable_bytes - CONTEXT_BYTES) / (1 + FRAGMENTATION_FRACTION)
        self._best_s = float("inf")
        self.fitting: list[Found] = []
        self.close: list[Found] = []
        self.num_not_fitting = 0
        self.num_simulated = 0
        self._projected: dict[tuple[int, ...], list[tuple[Family, Projection]]] = {}
        self._space, self._constants, self._bound = space, constants, bound
        self._efficiency = Efficiency(space.base.system)

    @property
    def num_examined(self) -> int:
        return len(self.fitting) + len(self.close) + self.num_not_fitting

    def limit_s(self, num_bytes: float) -> float:
        """Time above which a layout of at least `num_bytes` would be in no list."""
        if num_bytes > self._most_fitting_bytes:
            return min(self._best_s, self._close.limit_s(num_bytes))
        return self.front.limit_s(num_bytes)

    def examine(self, indices: tuple[int, ...]) -> None:
        recipe = self._space.recipe(indices)
        # the first rank holds most micro batches, and alone settles most of what does not fit
        if rank_memory(recipe, 0).total_bytes > self.front.usable_bytes:
            self.num_not_fitting += 1
            return
        memory = memory_fit(recipe)
        fits = verdict(memory)
        if fits is MemoryVerdict.DOES_NOT_FIT:
            self.num_not_fitting += 1
            return
        projection = self._projection(recipe, indices)
        found = Found(
            indices=indices,
            layout=self._space.layout(indices),
            projection=projection,
            memory=memory,
        )
        if fits is MemoryVerdict.FITS:
            self.fitting.append(found)
            self.front.add(projection.step_s, found.peak_bytes, group=found.group)
            self._best_s = min(self._best_s, projection.step_s)
        else:
            self.close.append(found)
            self._close.add(projection.step_s, found.peak_bytes, group=found.group)

    def _projection(self, recipe: Recipe, indices: tuple[int, ...]) -> Projection:
        """Of a layout, projected once for all dispatchers that price every operation and message alike."""
        family = indices[: Axis.SPLIT]
        known = self._projected.setdefault(_without_dispatcher(indices), [])
        for other, projection in known:
            if self._bound.is_priced_alike(family, other):
                return replace(projection, recipe=recipe)
        projection = project(recipe, constants=self._constants, efficiency=self._efficiency)
        known.append((family, projection))
        self.num_simulated += 1
        return projection


def _without_dispatcher(indices: tuple[int, ...]) -> tuple[int, ...]:
    return indices[: Axis.DISPATCHER] + indices[Axis.DISPATCHER + 1 :]


def peak_bytes(memory: MemoryFit) -> int:
    """What the fullest pipeline rank holds, without margins."""
    return max(rank.total_bytes for rank in memory.ranks)


def _candidates(space: Space, legality: Legality, bound: StepBound) -> _Candidates:
    """Legal layouts whose memory may suffice, with their lower bounds.

    Raises BadInputError where no layout is legal.
    """
    memory_bound = MemoryBound(space)
    gpu = space.base.system.gpu
    usable_bytes = gpu.usable_bytes if gpu is not None else 0
    families: list[Family] = []
    columns: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Floats, Floats]] = []
    num_legal = 0
    leanest: tuple[float, tuple[int, ...]] = (float("inf"), ())
    for group in _groups(legality):
        splits = sorted({split for _, legal in group for split in legal})
        is_legal = np.array([np.isin(splits, legal) for _, legal in group])
        members = [family for family, _ in group]
        memory = np.where(is_legal, memory_bound.of_group(members, splits), np.inf)
        row, column = np.unravel_index(int(np.argmin(memory)), memory.shape)
        leanest = min(leanest, (float(memory[row, column]), (*members[row], splits[column])))
        num_legal += int(is_legal.sum())
        rows, chosen = np.nonzero(memory * (1 - _ROUNDING) <= usable_bytes)
        if len(rows):
            held, own = np.unique(rows, return_inverse=True)
            small = [members[row] for row in held]
            step_s = bound.of_group(small, splits)[own, chosen] * (1 - _ROUNDING)
            columns.append((own + len(families), np.array(splits)[chosen], step_s, memory[rows, chosen]))
            families += small
    if not num_legal:
        raise BadInputError(_nothing_legal(space, legality))
    empty = (np.zeros(0, dtype=np.int64),) * 2 + (np.zeros(0),) * 2
    family, split, step_s, memory_bytes = map(np.concatenate, zip(empty, *columns, strict=True))
    return _Candidates(tuple(families), family, split, step_s, memory_bytes, num_legal, leanest[1])


def _groups(legality: Legality) -> Iterator[list[tuple[Family, tuple[int, ...]]]]:
    """Families that agree on widths, context, micro batch and overlap."""
    for _, group in groupby(legality.legal_families(), key=lambda found: found[0][: Axis.EXPERT]):
        yield list(group)


def _ordered(found: Sequence[Found]) -> list[Found]:
    """Fastest first, of equally fast ones the leaner; dispatchers that are projected alike as one."""
    distinct: dict[object, Found] = {}
    for one in sorted(found, key=lambda one: (one.projection.step_s, one.peak_bytes, one.indices)):
        layout = one.layout
        key = layout._replace(dispatcher="alltoall"), one.projection.step_s, one.peak_bytes
        if key in distinct:
            first = distinct[key]
            distinct[key] = replace(first, like=(*first.like, layout.dispatcher))
        else:
            distinct[key] = one
    return list(distinct.values())


def _grouped(ordered: Sequence[Found]) -> tuple[Found, ...]:
    """The first of each group, with how many others it has."""
    groups: dict[Hashable, list[Found]] = {}
    for one in ordered:
        groups.setdefault(one.group, []).append(one)
    return tuple(replace(first, num_variants=len(others)) for first, *others in groups.values())


def _front(ordered: Sequence[Found], front: Front) -> Iterator[tuple[float, Found]]:
    for ceiling in front.ceilings:
        below = (one for one in ordered if one.peak_bytes <= ceiling * front.usable_bytes)
        fastest = next(below, None)
        if fastest is not None:
            yield ceiling, fastest


def _nothing_legal(space: Space, legality: Legality) -> str:
    """With the rule that refuses most layouts, and what it says of one of them."""
    name, number = legality.refused.most_common(1)[0]
    begun = legality.examples[name]
    recipe = space.recipe((*begun, *(0 for _ in space.sizes[len(begun) :])))
    rule = next(rule for rule in RULES if rule.name == name)
    problem = next(rule.problems(recipe))
    return (
        f"no legal layout of {space.base.model.key} on {space.base.parallel.num_gpus} GPUs of "
        f"{space.base.system.key}: most, {number:,} of {space.num_layouts:,}, break the rule {name}, such as "
        f"{problem.problem}; {problem.fix}"
    )


def _nothing_fits(space: Space, candidates: _Candidates) -> str:
    """With the smallest need: that of the layout whose lower bound is the least."""
    recipe = space.recipe(candidates.leanest)
    fit = memory_fit(recipe)
    worst = fit.worst
    return (
        f"no layout of {space.base.model.key} fits {space.base.parallel.num_gpus} GPUs of "
        f"{space.base.system.key}: the leanest needs {worst.total_bytes / _GIB:.1f} of "
        f"{fit.usable_bytes / _GIB:.1f} GiB on pipeline rank {worst.pipeline_rank} of "
        f"{recipe.parallel.pipeline} ({worst.peak_at}); use more GPUs, or a smaller --seq-len"
    )
