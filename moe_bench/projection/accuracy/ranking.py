"""Whether the projection orders configurations as measurements do, and what its choice costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations

from moe_bench.projection.accuracy.step_time import ErrorSummary, RowResult, summary

APART_FRACTION = 0.1
"""Pairs of rows that differ by less in throughput are not ordered: releases differ by half of that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """How well configurations of one model and GPU are ordered."""

    num_pairs: int
    """Of one model and GPU, and more than APART_FRACTION apart."""
    num_ordered: int
    """Of these, in the right order."""
    num_like_pairs: int
    """Of equal precision, sequence length and number of GPUs besides: what is left is the layout."""
    num_like_ordered: int
    num_choices: int
    """Sets of several configurations of equal model, GPU, precision, length, size and release."""
    regret_fraction: float | None
    """Mean over the choices of how much slower the one recommended is than the best; None without any."""

    @property
    def ordered_fraction(self) -> float | None:
        """Share of pairs in the right order."""
        return self.num_ordered / self.num_pairs if self.num_pairs else None

    @property
    def like_ordered_fraction(self) -> float | None:
        """The same of like pairs."""
        return self.num_like_ordered / self.num_like_pairs if self.num_like_pairs else None


def ranking(results: Sequence[RowResult]) -> Ranking:
    """Pairs in order and the regret of the fastest projected configuration."""
    pairs, like = list(_pairs(results, _model_and_gpu)), list(_pairs(results, _experiment))
    regrets = [_regret(members) for members in _grouped(results, _choice) if _num_layouts(members) > 1]
    return Ranking(
        num_pairs=len(pairs),
        num_ordered=sum(pairs),
        num_like_pairs=len(like),
        num_like_ordered=sum(like),
        num_choices=len(regrets),
        regret_fraction=sum(regrets) / len(regrets) if regrets else None,
    )


def anchored(results: Sequence[RowResult]) -> ErrorSummary | None:
    """Errors of rows corrected by a neighbour of the same release, model, GPU and precision, by its published
    over projected throughput: what a user reaches who has measured one configuration.

    The neighbour is another configuration, the one nearest in size. None where no row has one.
    """
    corrected = []
    for members in _grouped(results, _stack):
        for one in members:
            others = [other for other in members if other.run.configuration != one.run.configuration]
            if others:
                corrected.append(one.corrected_by(min(others, key=lambda other: _distance(one, other))))
    return summary(corrected) if corrected else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleOutErrors:
    """Efficiency of larger jobs over smaller ones of one layout, projected against published."""

    num_pairs: int
    mean_fraction: float
    """Mean of |projected efficiency / published - 1|."""
    worst_fraction: float
    bias_fraction: float
    """Mean with its sign; positive where the projection loses too little."""


def scale_out_errors(results: Sequence[RowResult]) -> ScaleOutErrors | None:
    """Over pairs of rows that differ in replicas alone, by weak or strong scaling; None where there are none.

    Efficiency is throughput per GPU of the larger job over that of the smaller.
    """
    errors = []
    for members in _grouped(results, _replica):
        for one, two in combinations(sorted(members, key=_num_gpus), 2):
            has_equal_batch = two.run.recipe.global_batch_size == one.run.recipe.global_batch_size
            if _num_gpus(one) < _num_gpus(two) and (has_equal_batch or _per_gpu(one) == _per_gpu(two)):
                published = two.run.tokens_per_s_per_gpu / one.run.tokens_per_s_per_gpu
                projected = two.projected_tokens_per_s_per_gpu / one.projected_tokens_per_s_per_gpu
                errors.append(projected / published - 1)
    if not errors:
        return None
    return ScaleOutErrors(
        num_pairs=len(errors),
        mean_fraction=sum(map(abs, errors)) / len(errors),
        worst_fraction=max(map(abs, errors)),
        bias_fraction=sum(errors) / len(errors),
    )


def _pairs(results: Iterable[RowResult], key: Callable[[RowResult], str]) -> Iterator[bool]:
    """Of every pair of one group that is far enough apart: whether its order is right."""
    for members in _grouped(results, key):
        for one, two in combinations(members, 2):
            published = one.run.tokens_per_s_per_gpu / two.run.tokens_per_s_per_gpu
            if max(published, 1 / published) > 1 + APART_FRACTION:
                projected = one.projected_tokens_per_s_per_gpu / two.projected_tokens_per_s_per_gpu
                yield (published > 1) == (projected > 1)


def _regret(members: Sequence[RowResult]) -> float:
    chosen = max(members, key=lambda one: one.projected_tokens_per_s_per_gpu)
    best = max(one.run.tokens_per_s_per_gpu for one in members)
    return 1 - chosen.run.tokens_per_s_per_gpu / best


def _grouped(results: Iterable[RowResult], key: Callable[[RowResult], str]) -> Iterable[list[RowResult]]:
    groups: dict[str, list[RowResult]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return groups.values()


def _num_layouts(members: Iterable[RowResult]) -> int:
    return len({one.run.fold("layout") for one in members})


def _model_and_gpu(one: RowResult) -> str:
    return f"{one.run.recipe.model.key} {one.run.recipe.model.num_layers} {one.run.recipe.system.key}"


def _experiment(one: RowResult) -> str:
    recipe = one.run.recipe
    return f"{_model_and_gpu(one)} {recipe.precision} {recipe.seq_len} {recipe.parallel.num_gpus}"


def _choice(one: RowResult) -> str:
    return f"{_experiment(one)} {one.run.recipe.global_batch_size} {one.run.fold('release')}"


def _stack(one: RowResult) -> str:
    return f"{_model_and_gpu(one)} {one.run.recipe.precision} {one.run.fold('release')}"


def _replica(one: RowResult) -> str:
    """What a replica of the model is, the release and the knobs: all but the number of replicas."""
    return f"{_stack(one)} {one.run.fold('layout')} {_knobs(one)}"


def _num_gpus(one: RowResult) -> int:
    return one.run.recipe.parallel.num_gpus


def _per_gpu(one: RowResult) -> Fraction:
    return Fraction(one.run.recipe.global_batch_size, _num_gpus(one))


def _distance(one: RowResult, other: RowResult) -> tuple[int, float, str]:
    """Knobs that differ, then the size, then the id, so that the choice is the same everywhere."""
    sizes = [each.run.recipe.parallel.num_gpus for each in (one, other)]
    differing = sum(mine != theirs for mine, theirs in zip(_knobs(one), _knobs(other), strict=True))
    return differing, max(sizes) / min(sizes), other.run.row.id


def _knobs(one: RowResult) -> tuple[object, ...]:
    recipe = one.run.recipe
    return (
        recipe.dispatch.dispatcher,
        recipe.cuda_graphs,
        recipe.overlap,
        recipe.recompute,
        recipe.token_drop,
        recipe.routing.mode,
        recipe.seq_len,
        recipe.parallel.data_sharding,
        recipe.parallel.expert,
    )
