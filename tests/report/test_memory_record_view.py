"""What `accuracy --memory` shows to people and to programs."""

from __future__ import annotations

import json

from moe_bench.projection.accuracy.memory import Evidence, memory_record
from moe_bench.report.memory_record_view import memory_record_json, memory_sentences, memory_tables
from tests.projection.published_rows import CATALOGUE, made_row

PEAK = made_row(metrics={"tokens_per_s_per_gpu": 9000.0, "peak_mem_gb": 70.0}, note="memory in GiB")
FAILED = made_row(id="failed", mbs=64, metrics={})
RECORD = memory_record([PEAK], Evidence(corrections=(), failed=(FAILED,)), CATALOGUE)


def test_sentences_count_both_sides() -> None:
    ran, peaks, failed = memory_sentences(RECORD)
    assert ran.startswith("1 published runs: ")
    assert peaks.endswith("of 1 printed peaks within 10%")
    assert failed.startswith("1 runs known to have run out of memory: 0 called fitting")


def test_tables_name_the_rows() -> None:
    tables = memory_tables(RECORD)
    assert tables["printed peaks"].rows[0][:2] == ("made", "70.0")
    assert tables["ran out of memory"].rows[0][:2] == ("failed", "does not fit")
    assert "judged as they ran, not as they are recorded" not in tables


def test_json_has_every_row_and_adds_up() -> None:
    data = json.loads(json.dumps(memory_record_json(RECORD)))
    assert sum(data["num_by_verdict"].values()) == data["num_ran"] == len(data["ran"]) == 1
    (row,) = data["ran"]
    assert row["peak_error_fraction"] == row["held_bytes"] / (70 * 2**30) - 1
    assert data["failed"][0]["printed_bytes"] is None
