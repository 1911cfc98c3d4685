"""A list of records has a line each, whole names, and the same numbers in every format."""

import csv
import io
from pathlib import Path

from moe_bench.report.results_view import COLUMNS, entries_csv, entries_view, entry_line, record_view
from moe_bench.results.entry import entry_of
from moe_bench.results.summary import summary_of
from tests.report.test_jobs_view import printed
from tests.results.records import full, record

RECORD = record(full(("seed=1",)), step_times_s=((2.0,) * 20,) * 8, job_id="job42")
ENTRY = entry_of(summary_of(RECORD), Path("results/one.json"))


def test_every_record_has_a_line_and_older_ones_are_counted() -> None:
    head, line, foot = printed(entries_view([ENTRY], num_found=1200))
    assert head.split()[:4] == ["id", "recipe", "scale", "status"]
    assert line.split()[:5] == ["one", "qwen3_30b_a3b/h100_sxm_8g_bf16", "full", "modified", "steady"]
    assert foot == "1,200 records; 1,199 older ones: --limit, or ask for fewer"
    assert printed(entries_view([ENTRY], num_found=1))[-1] == "1 record"


def test_csv_has_what_json_has() -> None:
    (row,) = csv.DictReader(io.StringIO(entries_csv([ENTRY])))
    assert tuple(row) == COLUMNS
    assert row == {name: str(value) for name, value in entry_line(ENTRY).items()}
    assert float(row["tokens_per_s_per_gpu"]) == RECORD.plan.recipe.tokens_per_step / 2.0 / 8
    assert entries_csv([]).splitlines() == [",".join(COLUMNS)]


def test_one_record_is_shown_with_its_provenance() -> None:
    text = "\n".join(printed(record_view(RECORD, ENTRY, ())))
    for wanted in ("modified: seed=1", "steady from the first", "job42", "torch 2.15.0"):
        assert wanted in text
