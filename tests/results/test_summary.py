"""A summary is the same whether its record was read in full or without expert loads."""

import json
from pathlib import Path

import pytest

from moe_bench.results.store import read_record, write_record
from moe_bench.results.summary import Status, read_summary, summary_of
from moe_bench.results.validate import file_problems
from moe_bench.results.versioned import ForeignFileError, RecordError
from tests.results.records import full, record

STEADY = ((10.0, 10.1) * 10,) * 8


def test_a_summary_needs_no_expert_loads(tmp_path: Path) -> None:
    path = write_record(tmp_path, record(full(), step_times_s=STEADY))
    assert read_summary(path) == summary_of(read_record(path))


def test_a_record_that_was_written_with_indents_or_in_another_order_is_read_too(tmp_path: Path) -> None:
    asked = summary_of(record())
    tree = json.loads(record().model_dump_json())
    path = tmp_path / "one.json"
    path.write_text(json.dumps(tree, indent=1))
    assert read_summary(path) == asked
    path.write_text(json.dumps(tree | {"samples": dict(reversed(tree["samples"].items()))}))
    assert read_summary(path) == asked


def test_words_of_the_format_inside_a_text_are_only_text(tmp_path: Path) -> None:
    odd = record(commit='a "tokens_per_expert": [1], "energy_j": null')
    path = write_record(tmp_path, odd)
    assert read_summary(path) == summary_of(odd)


def test_loads_that_are_cut_short_are_noticed(tmp_path: Path) -> None:
    path = write_record(tmp_path, record())
    text = path.read_text()
    path.write_text(text[: text.index('"tokens_per_expert"') + 30])
    with pytest.raises(ForeignFileError, match=r"one|\.json: not a result file"):
        read_summary(path)


def test_an_empty_file_and_a_missing_one_are_named(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    with pytest.raises(RecordError, match=r"one\.json: not a result file \(No such file"):
        read_summary(path)
    path.touch()
    with pytest.raises(RecordError, match=r"one\.json: not a result file \(EOF"):
        read_summary(path)


@pytest.mark.parametrize(
    ("times_s", "status"),
    [
        ((10.0,) * 20, Status.STEADY),
        ((10.0,) * 5, Status.SHORT),
        (tuple(10.0 + step for step in range(20)), Status.DRIFTING),
    ],
)
def test_the_status_says_whether_the_steps_have_settled(times_s: tuple[float, ...], status: Status) -> None:
    assert summary_of(record(full(), step_times_s=(times_s,) * 8)).status is status


@pytest.mark.parametrize(
    "changes",
    [
        {"step_times_s": ()},
        {"step_times_s": ((),)},
        {"step_times_s": ((0.1, 0.1), (0.1,))},
        {"step_times_s": ((0.0, 0.0), (0.0, 0.0))},
        {"step_times_s": ((0.1,),) * 2 + ((0.2,),)},
        {"losses": ()},
        {"peak_memory_bytes": ()},
    ],
)
def test_numbers_that_cannot_be_reduced_are_the_files_fault(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    samples = record().samples.model_copy(update=changes)
    path = write_record(tmp_path, record().model_copy(update={"samples": samples}))
    with pytest.raises(RecordError, match=r"\.json: its numbers contradict each other") as caught:
        read_summary(path)
    assert str(path) in str(caught.value)
    assert file_problems(path)
