"""Records are written once, found again whole, and refused with a reason where they cannot be read."""

import multiprocessing
from collections import Counter
from pathlib import Path

import pytest

from moe_bench.results.store import read_record, read_records, record_folder, write_record
from moe_bench.results.versioned import ForeignFileError, RecordError
from tests.results.records import full, record


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    path = write_record(tmp_path, record())
    assert read_record(path) == record()


def test_the_path_says_model_recipe_scale_start_commit_and_job(tmp_path: Path) -> None:
    smoke = write_record(tmp_path, record(is_dirty=True))
    assert smoke.relative_to(tmp_path).as_posix() == (
        "qwen3_30b_a3b/h100_sxm_8g_bf16_smoke/20261122T070000Z-01234567-dirty-pid1.json"
    )
    whole = write_record(tmp_path, record(full(), job_id="job7"))
    assert whole.relative_to(tmp_path).as_posix() == (
        "qwen3_30b_a3b/h100_sxm_8g_bf16/20261122T070000Z-01234567-job7.json"
    )


def test_a_second_record_of_the_same_name_is_kept_beside_the_first(tmp_path: Path) -> None:
    first = write_record(tmp_path, record())
    before = first.read_bytes()
    others = [write_record(tmp_path, record(step_times_s=((0.5,),))) for _ in range(2)]
    assert [path.name for path in others] == [f"{first.stem}-{number}.json" for number in (2, 3)]
    assert first.read_bytes() == before
    assert len(list(read_records((tmp_path,)))) == 3


def write_many(root: Path, num_records: int) -> None:
    for step in range(num_records):
        write_record(root, record(step_times_s=((0.1 + step,),)))


def test_processes_that_write_at_once_under_one_name_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_many, args=(tmp_path, 20)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    times_s = Counter(found.samples.step_times_s[0][0] for found in read_records((tmp_path,)))
    assert times_s == {0.1 + step: 3 for step in range(20)}
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def test_a_record_takes_no_more_room_than_its_numbers(tmp_path: Path) -> None:
    assert write_record(tmp_path, record()).read_bytes().count(b"\n") == 1


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[: len(text) // 2], r"not a result file \(EOF"),
        (
            lambda text: text.replace('"schema_version":1', '"schema_version":99'),
            "schema_version: 99, 1 is read",
        ),
        (lambda text: text.replace('"losses"', '"lossses"'), r"samples\.losses: Field required"),
        (lambda text: "[]", "not a result file"),
        (lambda text: text.replace('"schema_version":1,', ""), r"\(no schema_version\)"),
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, damage, words: str) -> None:
    path = write_record(tmp_path, record())
    path.write_text(damage(path.read_text()))
    with pytest.raises(RecordError, match=words) as caught:
        read_record(path)
    assert str(path) in str(caught.value)


def test_folders_are_read_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for job in ("b", "a"):
        write_record(tmp_path, record(job_id=job))
    assert [found.provenance.job_id for found in read_records((tmp_path,))] == ["a", "b"]


def test_repeats_of_one_command_have_a_file_each(tmp_path: Path) -> None:
    first, second = write_record(tmp_path, record()), write_record(tmp_path, record(repeat=1))
    assert second.name == first.name.replace(".json", "-r1.json")
    assert {path.parent for path in (first, second)} == {record_folder(tmp_path, record().plan)}


def test_calibrations_beside_the_records_are_not_read_as_records(tmp_path: Path) -> None:
    write_record(tmp_path, record())
    calibration = tmp_path / "calibration" / "a_gpu" / "one.json"
    calibration.parent.mkdir(parents=True)
    calibration.write_text("{}")
    assert len(list(read_records((tmp_path,)))) == 1


def test_a_file_of_something_else_is_told_from_a_damaged_record(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text('{"loss": 1.0}')
    with pytest.raises(ForeignFileError):
        read_record(path)
    path.write_text('{"schema_version": 1}')
    with pytest.raises(RecordError, match="plan: Field required") as caught:
        read_record(path)
    assert not isinstance(caught.value, ForeignFileError)
