"""Records are chosen by what ran, where, when and with what, and one of them by a part of its name."""

from pathlib import Path

import pytest

from moe_bench.errors import BadInputError
from moe_bench.results.entry import Entry, entry_of
from moe_bench.results.query import Query, entry_by_id, queried
from moe_bench.results.store import record_path
from moe_bench.results.summary import summary_of
from moe_bench.spec.load import UnknownNameError
from tests.results.records import full, record

RECORDS = (
    record(job_id="job41", started_at="2026-11-20T23:59:59+00:00"),
    record(full(), step_times_s=((1.0,) * 20,) * 8, job_id="job42", commit="feedbeefcafe"),
    record(full(("seed=1",)), step_times_s=((1.0,) * 20,) * 8, job_id="pid7"),
)
ENTRIES = tuple(entry_of(summary_of(one), record_path(Path("results"), one)) for one in RECORDS)


def jobs(**asked: object) -> list[str]:
    return [entry.job_id for entry in queried(ENTRIES, Query(**asked))]  # type: ignore[arg-type]


def test_an_entry_says_what_ran_and_how_fast() -> None:
    entry: Entry = ENTRIES[1]
    assert (entry.model, entry.recipe) == ("qwen3_30b_a3b", "qwen3_30b_a3b/h100_sxm_8g_bf16")
    assert (entry.scale, entry.system, entry.precision, entry.num_ranks) == ("full", "h100_sxm", "bf16", 8)
    assert (entry.step_time_s, entry.status) == (1.0, "steady")
    assert entry.id == "20261122T070000Z-feedbeef-job42"


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, ["job42", "pid7", "job41"]),
        ({"model": "Qwen3-30B-A3B"}, ["job42", "pid7", "job41"]),
        ({"recipe": "h100_sxm_8g_bf16", "scale": "full"}, ["job42", "pid7"]),
        ({"scale": "smoke"}, ["job41"]),
        ({"status": "steady"}, ["job42", "pid7"]),
        ({"system": "cpu_host"}, ["job41"]),
        ({"precision": "bf16", "num_ranks": 8}, ["job42", "pid7"]),
        ({"num_ranks": 1024}, []),
        ({"commit": "feedbeefcafe"}, ["job42"]),
        ({"commit": "0123"}, ["pid7", "job41"]),
        ({"job": "42"}, ["job42"]),
        ({"job": "pid7"}, ["pid7"]),
        ({"since": "2026-11-21"}, ["job42", "pid7"]),
        ({"until": "2026-11-20"}, ["job41"]),
        ({"since": "2026-11-22 07:00", "until": "2026-11-22T07:00"}, ["job42", "pid7"]),
        ({"is_modified": True}, ["pid7"]),
        ({"is_modified": False}, ["job42", "job41"]),
    ],
)
def test_every_field_chooses(asked: dict[str, object], expected: list[str]) -> None:
    assert jobs(**asked) == expected


def test_the_newest_comes_first() -> None:
    starts = [entry.started_at for entry in queried(ENTRIES, Query())]
    assert starts == sorted(starts, reverse=True)


@pytest.mark.parametrize("asked", [{"model": "quen3_30b"}, {"scale": "smok"}, {"status": "stedy"}])
def test_a_name_that_none_has_is_refused_with_the_nearest(asked: dict[str, object]) -> None:
    with pytest.raises(UnknownNameError, match="did you mean"):
        jobs(**asked)


def test_what_is_no_date_is_refused() -> None:
    with pytest.raises(BadInputError, match=r"--since yesterday: .*write 2026-11-22"):
        jobs(since="yesterday")


@pytest.mark.parametrize("asked", ["20261122T070000Z-feedbeef-job42", "feedbeef", "42", "job42"])
def test_a_record_is_named_by_its_id_a_part_of_it_or_its_job(asked: str) -> None:
    assert entry_by_id(ENTRIES, asked) is ENTRIES[1]


def test_digits_are_a_job_or_the_beginning_of_an_id_and_no_part_of_a_time() -> None:
    with pytest.raises(UnknownNameError, match="there is no result '07'"):
        entry_by_id(ENTRIES, "07")


def test_a_record_is_named_by_its_path() -> None:
    assert entry_by_id(ENTRIES, str(ENTRIES[0].path)) is ENTRIES[0]


def test_a_name_that_means_several_or_none_is_refused() -> None:
    with pytest.raises(BadInputError, match=r"2026: 3 results are meant, .*; write more of the id"):
        entry_by_id(ENTRIES, "2026")
    with pytest.raises(UnknownNameError, match="did you mean '20261122T070000Z-feedbeef-job42'"):
        entry_by_id(ENTRIES, "20261122T070000Z-feedbeef-job43")
