"""The index says what the records say, notices every change, and can be killed, shared and deleted."""

import multiprocessing
import os
import signal
import sqlite3
from pathlib import Path

import pytest

from moe_bench.errors import BadInputError
from moe_bench.results import index as index_module
from moe_bench.results import workers
from moe_bench.results.index import BATCH, INDEX_NAME
from moe_bench.results.reading import Listener, read_entries, read_newest, read_summaries, refuse
from moe_bench.results.store import read_records, write_record
from moe_bench.results.summary import summary_of
from moe_bench.results.versioned import RecordError
from tests.results.listeners import Heard
from tests.results.records import full, record


@pytest.fixture(autouse=True)
def indexed_from_the_first_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "MIN_RECORDS", 0)


def fill(root: Path, num_records: int, *, start: int = 0) -> list[Path]:
    return [write_record(root, record(job_id=f"job{job}")) for job in range(start, start + num_records)]


def jobs(root: Path, heard: Heard) -> list[str]:
    return sorted(entry.job_id for entry in read_entries((root,), heard.listener))


def test_summaries_from_the_index_are_those_of_the_records(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    write_record(tmp_path, record(full(("seed=1",)), step_times_s=((10.0, 10.1) * 10,) * 8))
    for _ in range(2):  # built, then read back
        found = tuple(read_summaries((tmp_path,), Heard().listener))
        assert found == tuple(map(summary_of, read_records((tmp_path,))))


def test_nothing_is_read_again_that_has_not_changed(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    first, second = Heard(), Heard()
    assert jobs(tmp_path, first) == jobs(tmp_path, second) == ["job0", "job1", "job2"]
    assert (first.num_read, second.num_read) == (3, 0)


def test_new_changed_and_removed_records_are_noticed(tmp_path: Path) -> None:
    paths = fill(tmp_path, 3)
    jobs(tmp_path, Heard())
    fill(tmp_path, 1, start=3)
    status = paths[0].stat()
    paths[0].write_text(paths[0].read_text().replace("job0", "jobX"))
    os.utime(paths[0], ns=(status.st_atime_ns, status.st_mtime_ns))  # the size is the same, too
    paths[1].unlink()
    heard = Heard()
    assert jobs(tmp_path, heard) == ["job2", "job3", "jobX"]
    assert heard.num_read == 2


def test_a_small_folder_gets_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, 3)
    monkeypatch.setattr(index_module, "MIN_RECORDS", 4)
    assert len(jobs(tmp_path, Heard())) == 3
    assert not (tmp_path / INDEX_NAME).exists()
    fill(tmp_path, 1, start=3)
    assert len(jobs(tmp_path, Heard())) == 4
    assert (tmp_path / INDEX_NAME).is_file()


def test_deleting_the_index_loses_nothing(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    before = list(read_entries((tmp_path,), Heard().listener))
    (tmp_path / INDEX_NAME).unlink()
    assert list(read_entries((tmp_path,), Heard().listener)) == before


def test_other_code_derives_everything_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, 2)
    jobs(tmp_path, Heard())
    monkeypatch.setattr(index_module, "DERIVING", ("spec", "results"))
    heard = Heard()
    jobs(tmp_path, heard)
    assert heard.num_read == 2


def test_damaged_and_foreign_files_are_named_and_skipped_every_time(tmp_path: Path) -> None:
    (path,) = fill(tmp_path, 1)
    (tmp_path / "foreign.json").write_text('{"loss": 1.0}')
    (tmp_path / "binary.json").write_bytes(b"\x00\xff" * 10)
    cut = write_record(tmp_path, record(job_id="job9"))
    cut.write_text(cut.read_text()[:-200])
    (tmp_path / "newer.json").write_text(path.read_text().replace('"schema_version":1', '"schema_version":9'))
    for _ in range(2):
        heard = Heard()
        assert jobs(tmp_path, heard) == ["job0"]
        named = [line.partition(": ") for line in heard.skipped]
        assert [Path(name).name for name, _, _ in named] == [
            "binary.json",
            "foreign.json",
            "newer.json",
            cut.name,
        ]
        assert "schema_version: 9, 1 is read here" in named[2][2]
    with pytest.raises(RecordError):
        list(read_entries((cut,), Heard().listener))


def test_where_nothing_may_be_left_out_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "foreign.json").write_text("{}")
    strict = Listener(on_skipped=refuse, on_note=print, on_progress=lambda *_: None)
    with pytest.raises(BadInputError, match=r"foreign\.json: not a result file"):
        list(read_entries((tmp_path,), strict))


def test_calibrations_jobs_and_unfinished_records_are_no_results(tmp_path: Path) -> None:
    (path,) = fill(tmp_path, 1)
    for name in ("calibration/gpu/one.json", ".jobs/7.json", f"{path.parent.name}/.one.json.unfinished"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    heard = Heard()
    assert jobs(tmp_path, heard) == ["job0"]
    assert heard.skipped == []


def test_a_folder_below_uses_the_index_above(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    write_record(tmp_path, record(full()))
    jobs(tmp_path, Heard())
    heard = Heard()
    below = tmp_path / "qwen3_30b_a3b" / "h100_sxm_8g_bf16_smoke"
    assert jobs(below, heard) == ["job0", "job1"]
    assert heard.num_read == 0
    assert not (below / INDEX_NAME).exists()
    fill(tmp_path, 1, start=2)
    assert jobs(below, heard) == ["job0", "job1", "job2"]
    assert len(jobs(tmp_path, Heard())) == 4


def test_a_place_can_be_named_from_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    heard = Heard()
    assert jobs(Path(), heard) == jobs(Path("qwen3_30b_a3b"), heard) == ["job0", "job1"]
    assert heard.num_read == 2


def killed_after_a_batch(root: Path) -> None:
    kill = Listener(
        on_skipped=print, on_note=print, on_progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    )
    list(read_entries((root,), kill))


def test_a_build_that_is_killed_goes_on_from_where_it_was(tmp_path: Path) -> None:
    fill(tmp_path, BATCH + 10)
    builder = multiprocessing.get_context("spawn").Process(target=killed_after_a_batch, args=(tmp_path,))
    builder.start()
    builder.join()
    assert builder.exitcode == -signal.SIGKILL
    heard = Heard()
    assert len(jobs(tmp_path, heard)) == BATCH + 10
    assert heard.num_read == 10


def build(root: Path) -> None:
    assert len(list(read_entries((root,), Heard().listener))) == 2 * BATCH


def test_processes_that_build_at_once_agree(tmp_path: Path) -> None:
    fill(tmp_path, 2 * BATCH)
    context = multiprocessing.get_context("spawn")
    builders = [context.Process(target=build, args=(tmp_path,)) for _ in range(3)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert [builder.exitcode for builder in builders] == [0, 0, 0]
    heard = Heard()
    assert len(jobs(tmp_path, heard)) == 2 * BATCH
    assert heard.num_read == 0


def test_many_files_are_read_by_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, 20)
    monkeypatch.setattr(workers, "MIN_FILES", 2)
    heard = Heard()
    assert len(jobs(tmp_path, heard)) == 20
    assert heard.num_read == 20


def test_a_spoiled_index_is_made_anew(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    (tmp_path / INDEX_NAME).write_bytes(b"no database at all " * 100)
    heard = Heard()
    assert jobs(tmp_path, heard) == ["job0", "job1"]
    assert heard.notes == []
    jobs(tmp_path, heard)
    assert heard.num_read == 2


def test_where_the_index_cannot_be_kept_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, 2)
    jobs(tmp_path, Heard())
    connect = sqlite3.connect

    def read_only(place: str, *, uri: bool = False, **options: object) -> sqlite3.Connection:
        if place != ":memory:" and not uri:
            place, uri = f"file:{place}?mode=ro", True
        return connect(place, uri=uri, **options)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(sqlite3, "connect", read_only)
    heard = Heard()
    assert jobs(tmp_path, heard) == ["job0", "job1"]
    assert heard.num_read == 0  # what was in it still serves
    fill(tmp_path, 1, start=2)
    assert len(tuple(read_summaries((tmp_path,), heard.listener))) == 3
    assert heard.num_read == 1
    assert INDEX_NAME in heard.notes[0]
    assert "readonly" in heard.notes[0]


def test_the_newest_of_each_recipe_and_scale_is_read_in_full(tmp_path: Path) -> None:
    old = write_record(tmp_path, record(started_at="2026-11-21T07:00:00+00:00"))
    new = write_record(tmp_path, record(job_id="job2"))
    whole = write_record(tmp_path, record(full()))
    newest, older = read_newest((tmp_path,), Heard().listener)
    assert newest == tuple(read_records(tuple(sorted((new, whole)))))
    assert older == tuple(map(summary_of, read_records((old,))))
