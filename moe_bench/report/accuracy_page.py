"""The tables of accuracy in docs/accuracy.md and README, and the interval widths that follow from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from moe_bench.projection.accuracy.step_time import ErrorSummary, RowResult, summaries_by, summary
from moe_bench.projection.interval import NUM_INFERRED, HalfWidths, half_widths
from moe_bench.report.accuracy_view import GROUPS, Accuracy, sentences

BEGIN, END = "<!-- accuracy: begin -->", "<!-- accuracy: end -->"
MEMORY_MARKS = "<!-- memory: begin -->", "<!-- memory: end -->"
HEADINGS = ("MAPE", "median", "bias", "p90", "naive MAPE")
_PER_CENT = 100


def accuracy_page(by_fold: Mapping[str, Accuracy]) -> str:
    """Markdown of several cross-validations, by what they leave out; `model` must be among them."""
    main = by_fold["model"]
    lines = [*_table("left out", _folds(by_fold)), ""]
    for name in ("kind", "system", "precision", "framework", "model"):
        lines += [*_table(f"by {name}", summaries_by(main.counted, GROUPS[name])), ""]
    lines += [f"- {sentence}" for sentence in sentences(main)]
    return "\n".join(lines)


def readme_table(by_fold: Mapping[str, Accuracy]) -> str:
    """The few lines that README quotes."""
    main = by_fold["model"].counted
    groups = {
        "all": summary(main),
        **summaries_by(main, GROUPS["kind"]),
        "H100": summary([one for one in main if one.run.fold("system") == "h100"]),
    }
    return "\n".join(_table("rows, model family left out", groups))


def replaced(page: str, table: str, *, marks: tuple[str, str] = (BEGIN, END)) -> str:
    """`page` with `table` between its marks. Raises ValueError where it has none."""
    before, begin, rest = page.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise ValueError(f"no {marks[0]} and {marks[1]} in the page")
    return f"{before}{begin}\n{table}\n{end}{after}"


def error_cells(one: ErrorSummary) -> tuple[str, ...]:
    """The same cells as they are printed."""
    errors = (one.mape_fraction, one.median_fraction, one.bias_fraction, one.p90_fraction)
    # adding 0 makes -0.0 of a small negative error 0.0
    return tuple(f"{round(_PER_CENT * error, 1) + 0:.1f}" for error in (*errors, one.baseline_mape_fraction))


def widths(made: Accuracy) -> dict[str, HalfWidths]:
    """The constants of projection/interval.py by name; `made` leaves out the model family."""
    return {
        "DENSE": half_widths(_log_ratios(made, "dense")),
        "MOE": half_widths(_of_moe(made, prints_much=True)),
        "MOE_INFERRED": half_widths(_of_moe(made, prints_much=False)),
    }


def _of_moe(made: Accuracy, *, prints_much: bool) -> Sequence[float]:
    """Of MoE rows with few deciding fields inferred, or with many (projection/interval.py)."""
    rows = [one for one in made.counted if GROUPS["kind"](one) == "MoE"]
    return [_log_ratio(one) for one in rows if (one.num_inferred <= NUM_INFERRED) == prints_much]


def _log_ratios(made: Accuracy, kind: str) -> Sequence[float]:
    return [_log_ratio(one) for one in made.counted if GROUPS["kind"](one) == kind]


def _log_ratio(one: RowResult) -> float:
    return math.log(one.run.tokens_per_s_per_gpu / one.projected_tokens_per_s_per_gpu)


def _folds(by_fold: Mapping[str, Accuracy]) -> dict[str, ErrorSummary]:
    found = {}
    for name, made in by_fold.items():
        found[name] = summary(made.counted)
        if name == "model":
            h100 = [one for one in made.counted if one.run.fold("system") == "h100"]
            found["model, H100 alone"] = summary(h100)
    return found


def _table(first: str, groups: Mapping[str, ErrorSummary]) -> Iterator[str]:
    yield f"| {first} | rows | {' | '.join(HEADINGS)} |"
    yield "|---|--:" + "|--:" * len(HEADINGS) + "|"
    for name, one in groups.items():
        yield f"| {name} | {one.num_rows} | {' | '.join(error_cells(one))} |"
