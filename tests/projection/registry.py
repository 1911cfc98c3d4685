"""The registry held against its projections, once for all tests that need it."""

from __future__ import annotations

from functools import cache

from moe_bench.projection.accuracy.memory import as_they_ran, load_evidence
from moe_bench.projection.accuracy.step_time import Projectable, accuracy_of, projectable
from moe_bench.projection.rows.folds import FoldBy
from moe_bench.report.accuracy_view import Accuracy
from moe_bench.spec.catalogue import data_root
from tests.projection.published_rows import CATALOGUE, ROWS


@cache
def found() -> Projectable:
    """Every training row as a complete recipe."""
    known = load_evidence(data_root() / "results" / "published" / "known")
    return projectable(as_they_ran(ROWS, known), CATALOGUE)


@cache
def accuracy(left_out: FoldBy | None) -> Accuracy:
    """Every projectable row under constants that did not see its group."""
    return Accuracy(found=found(), results=accuracy_of(found(), left_out=left_out), left_out=left_out)
