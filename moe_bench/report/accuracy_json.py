"""The accuracy of projections as JSON: overall, by group and by row."""

from __future__ import annotations

import dataclasses

from moe_bench.projection.accuracy.ranking import anchored, ranking, scale_out_errors
from moe_bench.projection.accuracy.step_time import (
    ErrorSummary,
    RowResult,
    prints_layout,
    summaries_by,
    summary,
)
from moe_bench.report.accuracy_view import GROUPS, Accuracy, row_line


def accuracy_json(made: Accuracy) -> dict[str, object]:
    """Everything. `rows` counts the rows that train a whole model and `projected` those of them that are
    projected; the errors are those of the projected rows that count.
    """
    found, counted = made.found, made.counted
    rows = [run.row for run in found.runs] + [one.row for one in found.failed]
    order = ranking(counted)
    anchor, scaling = anchored(counted), scale_out_errors(counted)
    return {
        "cross_validation": made.left_out,
        "rows": len(rows),
        "projected": len(found.runs),
        "rows_with_full_layout": sum(map(prints_layout, rows)),
        "projected_with_full_layout": sum(prints_layout(run.row) for run in found.runs),
        "counted": len(counted),
        **(errors_json(summary(counted)) if counted else {}),
        "groups": {
            name: {
                group: {"rows": one.num_rows, **errors_json(one)}
                for group, one in summaries_by(counted, key).items()
            }
            for name, key in GROUPS.items()
        },
        "ranking": {
            **dataclasses.asdict(order),
            "ordered_fraction": order.ordered_fraction,
            "like_ordered_fraction": order.like_ordered_fraction,
        },
        "anchored": None if anchor is None else {"rows": anchor.num_rows, **errors_json(anchor)},
        "scale_out": None if scaling is None else dataclasses.asdict(scaling),
        "uneven_routing": {
            "rows": len(made.uneven),
            **(errors_json(summary(made.uneven)) if made.uneven else {}),
        },
        "suspects": [
            {
                "id": one.result.run.row.id,
                "step_time_error_fraction": one.result.step_time_error,
                "evidence": one.evidence,
            }
            for one in made.suspects
        ],
        "not_projected": [
            {"id": one.row.id, "reason": one.reason, "prints_full_layout": prints_layout(one.row)}
            for one in found.failed
        ],
        "per_row": [_row_json(one) for one in made.results],
    }


def errors_json(one: ErrorSummary) -> dict[str, float]:
    """Errors of step time over a set of rows."""
    return {
        "step_time_mape_fraction": one.mape_fraction,
        "step_time_median_fraction": one.median_fraction,
        "step_time_bias_fraction": one.bias_fraction,
        "step_time_p90_fraction": one.p90_fraction,
        "baseline_step_time_mape_fraction": one.baseline_mape_fraction,
    }


def _row_json(one: RowResult) -> dict[str, object]:
    assumptions = [dataclasses.asdict(each) for each in one.run.assumptions]
    return {**row_line(one), "assumptions": assumptions}
