"""Published rows that the projection contradicts, with what the other rows of the registry say of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from moe_bench.projection.accuracy.step_time import RowResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """One row, the rows that repeat its configuration, and those of its model, GPU and precision."""

    result: RowResult
    num_repeats: int
    repeats_over_row_ratio: float | None
    """Median throughput of the repeats over the row's; None without any."""
    num_like: int
    like_error_fraction: float | None
    """Median error of the like rows; None without any."""

    @property
    def evidence(self) -> str:
        """In words."""
        parts = []
        if self.repeats_over_row_ratio is not None:
            count = "a repeat" if self.num_repeats == 1 else f"{self.num_repeats} repeats"
            parts.append(
                f"{count} of its configuration: {self.repeats_over_row_ratio:.2f} times its throughput"
            )
        if self.like_error_fraction is not None:
            rows = "other row" if self.num_like == 1 else "other rows"
            like = f"{self.num_like} {rows} of its model, GPU and precision"
            parts.append(f"{like}: {self.like_error_fraction:+.0%}")
        return "; ".join(parts) or "no other row to hold it against"


def suspects(results: Sequence[RowResult]) -> tuple[Suspect, ...]:
    """The suspect ones of `results`, worst first; the others are their witnesses."""
    worst_first = sorted(results, key=lambda one: -abs(one.step_time_error))
    return tuple(_suspect(one, results) for one in worst_first if one.is_suspect)


def _suspect(one: RowResult, results: Sequence[RowResult]) -> Suspect:
    others = [other for other in results if other.run.row.id != one.run.row.id]
    repeats = [other for other in others if other.run.configuration == one.run.configuration]
    like = [other for other in others if _experiment(other) == _experiment(one) and not other.is_suspect]
    published = one.run.tokens_per_s_per_gpu
    return Suspect(
        result=one,
        num_repeats=len(repeats),
        repeats_over_row_ratio=statistics.median(each.run.tokens_per_s_per_gpu for each in repeats)
        / published
        if repeats
        else None,
        num_like=len(like),
        like_error_fraction=statistics.median(each.step_time_error for each in like) if like else None,
    )


def _experiment(one: RowResult) -> tuple[str, str, str]:
    return one.run.fold("model"), one.run.fold("system"), one.run.recipe.precision
