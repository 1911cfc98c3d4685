"""What `accuracy` prints: errors of step time by group beside a naive predictor's, ranking, and suspects."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from moe_bench.projection.accuracy.ranking import APART_FRACTION, anchored, ranking, scale_out_errors
from moe_bench.projection.accuracy.step_time import (
    SUSPECT_FRACTION,
    ErrorSummary,
    Projectable,
    RowResult,
    prints_layout,
    summaries_by,
    summary,
)
from moe_bench.projection.accuracy.suspects import Suspect, suspects
from moe_bench.report.columns import Columns
from moe_bench.report.figures import rate_text
from moe_bench.report.recipe_list import layout_label
from moe_bench.results.row_recipe import PRECISIONS

_MAX_GROUPS = 12
"""Groups of a kind that a terminal shows; JSON has all."""

GROUPS: Mapping[str, Callable[[RowResult], str]] = {
    "kind": lambda one: "dense" if one.run.recipe.model.moe is None else "MoE",
    "model": lambda one: one.run.fold("model"),
    "system": lambda one: one.run.fold("system"),
    "precision": lambda one: PRECISIONS.get(one.run.recipe.precision, one.run.recipe.precision),
    "release": lambda one: one.run.fold("release"),
    "framework": lambda one: str(one.run.stack.suite),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """A registry held against its projections."""

    found: Projectable
    results: tuple[RowResult, ...]
    left_out: str | None
    """What the constants had not seen of a row; None where they are the shipped ones."""

    @property
    def counted(self) -> tuple[RowResult, ...]:
        """Rows that enter summaries."""
        return tuple(one for one in self.results if one.counts)

    @property
    def uneven(self) -> tuple[RowResult, ...]:
        """Those whose experts are loaded unevenly or limited by a capacity."""
        return tuple(one for one in self.counted if one.has_natural_routing)

    @property
    def suspects(self) -> tuple[Suspect, ...]:
        """Rows that the projection contradicts, worst first, those that do not count included."""
        return suspects(self.results)


def accuracy_view(made: Accuracy) -> RenderableType:
    """Tables of errors by group beside the naive predictor's, ranking, and suspect rows."""
    if not made.counted:
        return Group(Text("no row of this file can be projected and counts", style="bold"), _failures(made))
    how = (
        "the shipped constants"
        if made.left_out is None
        else f"constants fitted without the row's {made.left_out}"
    )
    head = f"{len(made.counted)} published rows under {how}: error of step time"
    parts: list[RenderableType] = [
        Text(head, style="bold"),
        _summary_table({"all rows": summary(made.counted)}),
    ]
    for name, group in GROUPS.items():
        groups = summaries_by(made.counted, group)
        shown = dict(list(groups.items())[:_MAX_GROUPS])
        parts += [Text(), Text(f"by {name}", style="bold"), _summary_table(shown)]
        if len(groups) > len(shown):
            parts.append(Text(f"and {len(groups) - len(shown)} more: --json", style="dim"))
    parts += [
        Text(),
        *(Text(line) for line in sentences(made)),
        Text(),
        _suspects(made),
        Text(),
        _failures(made),
    ]
    return Group(*parts)


def accuracy_csv(made: Accuracy) -> str:
    """One line per projected row."""
    text = io.StringIO()
    lines = [row_line(one) for one in made.results]
    writer = csv.DictWriter(text, fieldnames=list(lines[0]) if lines else ["id"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def row_line(one: RowResult) -> dict[str, str | float | bool]:
    """One projected row, flat."""
    recipe = one.run.recipe
    return {
        "id": one.run.row.id,
        "published_tokens_per_s_per_gpu": one.run.tokens_per_s_per_gpu,
        "published_basis": one.run.target.basis,
        "projected_tokens_per_s_per_gpu": one.projected_tokens_per_s_per_gpu,
        "step_time_error_fraction": one.step_time_error,
        "baseline_step_time_error_fraction": one.baseline_error,
        "counts": one.counts,
        "trust": one.run.row.trust,
        "num_inferred": one.num_inferred,
        "layout": layout_label(recipe),
        **{name: group(one) for name, group in GROUPS.items()},
    }


def _summary_table(groups: Mapping[str, ErrorSummary]) -> Columns:
    headings = ("", "rows", "MAPE", "median", "bias", "p90", "naive MAPE")
    return Columns(
        headings=headings,
        rows=tuple(
            (
                name,
                str(one.num_rows),
                f"{one.mape_fraction:.1%}",
                f"{one.median_fraction:.1%}",
                f"{one.bias_fraction:+.1%}",
                f"{one.p90_fraction:.1%}",
                f"{one.baseline_mape_fraction:.1%}",
            )
            for name, one in groups.items()
        ),
        right=frozenset(headings[1:]),
    )


def sentences(made: Accuracy) -> Sequence[str]:
    """Ranking, regret, anchors and uneven routing in words; at least one row must count."""
    order = ranking(made.counted)
    lines = []
    if order.ordered_fraction is not None:
        lines.append(
            f"layout ranking: {order.ordered_fraction:.1%} of {order.num_pairs:,} pairs of one model and GPU "
            f"that differ by more than {APART_FRACTION:.0%} are in the right order"
        )
    if order.like_ordered_fraction is not None:
        lines.append(
            f"of equal precision, length and number of GPUs besides: {order.like_ordered_fraction:.1%} of "
            f"{order.num_like_pairs:,}"
        )
    if order.regret_fraction is not None:
        lines.append(
            f"regret of the layout projected fastest: {order.regret_fraction:.1%} "
            f"over {order.num_choices} choices"
        )
    scaling = scale_out_errors(made.counted)
    if scaling is not None:
        lines.append(
            f"scale-out: efficiency of the larger job off by {scaling.mean_fraction:.1%} on average (bias "
            f"{scaling.bias_fraction:+.1%}), {scaling.worst_fraction:.1%} at worst, over {scaling.num_pairs} "
            "pairs that differ in replicas alone"
        )
    anchor = anchored(made.counted)
    if anchor is not None:
        lines.append(
            f"with the nearest row of the same release as anchor: MAPE {anchor.mape_fraction:.1%}, median "
            f"{anchor.median_fraction:.1%} over {anchor.num_rows} rows"
        )
    if made.uneven:
        uneven = summary(made.uneven)
        lines.append(
            f"natural, skewed and capacity-limited routing: MAPE {uneven.mape_fraction:.1%} over "
            f"{uneven.num_rows} rows"
        )
    return lines


def _suspects(made: Accuracy) -> RenderableType:
    if not made.suspects:
        return Text(f"no row is contradicted by more than {SUSPECT_FRACTION:.0%}")
    return Group(
        Text(f"suspects: contradicted by more than {SUSPECT_FRACTION:.0%}", style="bold"),
        Columns(
            headings=("row", "published", "projected", "step time", "trust", "evidence"),
            rows=tuple(
                (
                    one.result.run.row.id,
                    rate_text(one.result.run.tokens_per_s_per_gpu),
                    rate_text(one.result.projected_tokens_per_s_per_gpu),
                    f"{one.result.step_time_error:+.0%}",
                    one.result.run.row.trust,
                    one.evidence,
                )
                for one in made.suspects
            ),
            right=frozenset(("published", "projected", "step time")),
            is_stacked=True,
        ),
    )


def _failures(made: Accuracy) -> RenderableType:
    """Rows that cannot be projected: by reason, and by name where they print a full layout."""
    failed = made.found.failed
    num_full = sum(prints_layout(run.row) for run in made.found.runs)
    named = [one for one in failed if prints_layout(one.row)]
    reasons = Counter(one.reason for one in failed if not prints_layout(one.row))
    lines = [
        f"{num_full} of {num_full + len(named)} rows that print a full layout are projected, and "
        f"{len(made.found.runs) - num_full} that do not; {made.found.num_others} others train no whole model",
        *(f"not projected: {one.row.id}: {one.reason}" for one in named),
        *(
            f"not projected, {number} without a full layout: {reason}"
            for reason, number in reasons.most_common()
        ),
    ]
    return Group(*(Text(line, style="dim") for line in lines))
