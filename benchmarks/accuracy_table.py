"""The accuracy of projections, of step time and memory, as the tables of README.md and docs/.

    python benchmarks/accuracy_table.py            # prints them, and the widths of the intervals
    python benchmarks/accuracy_table.py --write    # writes them into the pages and projection/interval.py

Runs for about a minute of one core. To be run after every change of rows, rules, rates or constants.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import get_args

from moe_bench.projection.accuracy.memory import as_they_ran, load_evidence, memory_record
from moe_bench.projection.accuracy.step_time import accuracy_of, projectable
from moe_bench.projection.rows.folds import FoldBy
from moe_bench.projection.rows.inference import load_catalogue
from moe_bench.report.accuracy_page import (
    BEGIN,
    END,
    MEMORY_MARKS,
    accuracy_page,
    readme_table,
    replaced,
    widths,
)
from moe_bench.report.accuracy_view import Accuracy
from moe_bench.report.memory_record_view import memory_record_markdown
from moe_bench.results.published import load_rows

ROOT = Path(__file__).resolve().parents[1]
INTERVAL = ROOT / "moe_bench" / "projection" / "interval.py"


def main() -> None:
    """Cross-validate in every way, then print or write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    is_written = parser.parse_args().write
    published = ROOT / "results" / "published"
    rows, catalogue = load_rows(published), load_catalogue(ROOT / "recipes")
    evidence = load_evidence(published / "known")
    found = projectable(as_they_ran(rows, evidence), catalogue)
    by_fold = {
        fold: Accuracy(found=found, results=accuracy_of(found, left_out=fold), left_out=fold)
        for fold in get_args(FoldBy)
    }
    memory = memory_record_markdown(memory_record(rows, evidence, catalogue))
    for path, table, marks in (
        (ROOT / "docs" / "accuracy.md", accuracy_page(by_fold), (BEGIN, END)),
        (ROOT / "docs" / "memory_accuracy.md", memory, MEMORY_MARKS),
        (ROOT / "README.md", readme_table(by_fold), (BEGIN, END)),
    ):
        if is_written:
            page = replaced(path.read_text(encoding="utf-8"), table, marks=marks)
            path.write_text(page, encoding="utf-8")
        else:
            print(table, end="\n\n")
    source = INTERVAL.read_text(encoding="utf-8")
    for name, width in widths(by_fold["model"]).items():
        p50, p90 = f"{width.p50_fraction:.3f}", f"{width.p90_fraction:.3f}"
        text = f"{name} = HalfWidths(p50_fraction={p50}, p90_fraction={p90})"
        print(text)
        source = re.sub(rf"^{name} = HalfWidths\(.*\)$", text, source, flags=re.MULTILINE)
    if is_written:
        INTERVAL.write_text(source, encoding="utf-8")


if __name__ == "__main__":
    main()
