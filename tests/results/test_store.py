"""Records are written once, found again whole, and refused with a reason where they cannot be read."""

from pathlib import Path

import pytest

from moe_bench.results.store import RecordError, read_record, read_records, record_folder, write_record
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


def test_a_record_is_never_overwritten(tmp_path: Path) -> None:
    path = write_record(tmp_path, record())
    before = path.read_bytes()
    with pytest.raises(RecordError, match="results are never overwritten"):
        write_record(tmp_path, record())
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[: len(text) // 2], "not a result file"),
        (
            lambda text: text.replace('"schema_version": 1', '"schema_version": 99'),
            "schema version 99, 1 is read",
        ),
        (lambda text: text.replace('"losses"', '"lossses"'), r"samples\.losses: Field required"),
        (lambda text: "[]", "not a result file"),
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
