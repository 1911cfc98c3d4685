"""Records and jobs on the command line: what is chosen, shown, refused and ended."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_bench.cli import main
from moe_bench.launch.local_runs import read_local_runs
from moe_bench.results.store import write_record
from tests.results.records import full, record

STEADY = ((2.0, 2.1) * 10,) * 8


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_record(tmp_path, record(job_id="job41", started_at="2026-11-20T07:00:00+00:00"))
    write_record(tmp_path, record(full(), step_times_s=STEADY, job_id="job42"))
    write_record(tmp_path, record(full(("seed=1",)), step_times_s=STEADY, job_id="pid7"))
    return tmp_path


def ids(capsys: pytest.CaptureFixture[str], root: Path, *options: str) -> list[str]:
    assert main(["results", "--results", str(root), *options, "--json"]) == 0
    return [line["job_id"] for line in json.loads(capsys.readouterr().out)]


def test_records_are_chosen_and_listed_newest_first(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ids(capsys, root) == ["job42", "pid7", "job41"]
    assert ids(capsys, root, "--scale", "full", "--as-asked") == ["job42"]
    assert ids(capsys, root, "--modified", "--status", "steady") == ["pid7"]
    assert ids(capsys, root, "--until", "2026-11-21") == ["job41"]
    assert ids(capsys, root, "--limit", "2") == ["job42", "pid7"]


def test_the_list_has_as_many_lines_as_records_in_every_format(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["results", "--results", str(root)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "3 records"
    assert main(["results", "--results", str(root), "--csv"]) == 0
    assert len(list(csv.DictReader(io.StringIO(capsys.readouterr().out)))) == 3


def test_one_record_is_shown_by_id_job_and_path(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = root.rglob("*job42.json")
    for name in (path.stem, "42", str(path)):
        assert main(["results", "--results", str(root), "show", name, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["record"], told["provenance"]["job_id"]) == (str(path), "job42")
    assert main(["results", "show", "42", "--results", str(root)]) == 0
    assert "job42" in capsys.readouterr().out
    assert main(["results", "--results", str(root), "show", "2026"]) == 2
    assert "write more of the id" in capsys.readouterr().err
    assert main(["results", "--results", str(root), "--scale", "smoke", "show", "42"]) == 2
    assert "there is no result '42'" in capsys.readouterr().err


def test_check_reads_what_the_list_does_not_and_ends_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_record(tmp_path, record())
    checked = ["results", "--results", str(tmp_path), "check"]
    assert main(checked) == 0
    assert capsys.readouterr().out == "1 record, no problems\n"
    path.write_text(path.read_text().replace("[10,30]", '[10,"x"]'))
    (tmp_path / "foreign.json").write_text("{}")
    assert main([*checked, "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["num_records"] == 1
    assert [Path(problem.partition(":")[0]) for problem in told["problems"]] == [
        tmp_path / "foreign.json",
        path,
    ]


def test_many_skipped_files_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(15):
        (tmp_path / f"{number}.json").write_text("{}")
    assert main(["results", "--results", str(tmp_path)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[-1] == "skipped 5 more: moe-bench results check"


def test_reproduce_reads_no_more_than_it_was_asked_for(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    from moe_bench.results import index

    parsed = index._summary

    def spied(text, shared):  # type: ignore[no-untyped-def]
        read.append(text)
        return parsed(text, shared)

    monkeypatch.setattr(index, "_summary", spied)
    monkeypatch.setattr(index, "MIN_RECORDS", 0)
    assert main(["reproduce", "qwen3_30b_a3b/h100_sxm_16g_bf16", "--results", str(root)]) == 0
    assert read == []
    assert main(["report", str(root)]) == 0
    assert len(read) == 3


def test_the_page_reads_in_full_only_the_newest_of_each_kind(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for day in range(1, 4):
        old = record(
            full(), step_times_s=STEADY, job_id=f"job{day}", started_at=f"2026-10-0{day}T07:00:00+00:00"
        )
        write_record(root, old)
    assert main(["report", str(root), "--html", str(root / "page.html")]) == 0
    page = (root / "page.html").read_text()
    assert "6 runs" in page
    assert page.count("2026-10-02 07:00") == 1  # in the table of all
    assert "job2" not in page


def test_without_a_folder_of_results_the_readers_show_what_others_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_bench.cli.options.results_root", lambda: tmp_path / "results")
    page = tmp_path / "page.html"
    for readers in (["report"], ["report", "--scaling"], ["report", "--html", str(page)], ["results"]):
        assert main(readers) == 0
    assert "weak scaling of deepseek_v3" in capsys.readouterr().out
    assert page.is_file()


def test_runs_without_a_scheduler_are_listed_shown_and_cancelled(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = (
        "import sys, time; from pathlib import Path; from tests.launch.test_local_runs import note\n"
        "with note(Path(sys.argv[1])): print('up', flush=True); time.sleep(600)"
    )
    jobs = ["jobs", "--results", str(root)]
    with subprocess.Popen((sys.executable, "-c", code, str(root)), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert main([*jobs, "--state", "running", "--json"]) == 0
        assert [job["id"] for job in json.loads(capsys.readouterr().out)] == [f"pid{process.pid}"]
        assert main([*jobs, "log", f"pid{process.pid}"]) == 2
        assert main([*jobs, "cancel", f"pid{process.pid}"]) == 0
        process.wait()
    assert read_local_runs(root)[0].is_cancelled
    capsys.readouterr()
    assert main(jobs) == 0
    assert capsys.readouterr().out.splitlines()[0] == "3 done, 1 cancelled"
    assert main([*jobs, "cancel", f"pid{process.pid}"]) == 2
    assert "is cancelled: there is nothing to cancel" in capsys.readouterr().err
    assert main([*jobs, "show", "pid8"]) == 2
    for name in ("pid7", "7"):
        assert main(["jobs", "show", name, "--results", str(root)]) == 0
    assert main([*jobs, "--state", "faild"]) == 2
    assert "did you mean 'failed'" in capsys.readouterr().err
