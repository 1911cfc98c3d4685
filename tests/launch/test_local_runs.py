"""A run without a scheduler leaves a note while it lasts, and one that says why where it leaves no record."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moe_bench.errors import BadInputError, MeasurementError
from moe_bench.launch.local_runs import FOLDER, cancel_local, noted, read_local_runs
from moe_bench.spec.scale import full_plan
from tests.launch.conftest import recipe_of

PLAN = full_plan(recipe_of(), modified=())


def note(root: Path, env: dict[str, str] | None = None, repeat: int = 0):
    return noted(root, PLAN, repeat=repeat, command=("moe-bench", "run"), env=env or {})


def test_a_run_is_known_while_it_lasts(tmp_path: Path) -> None:
    with note(tmp_path):
        (run,) = read_local_runs(tmp_path)
        assert (run.process_id, run.is_running, run.plan) == (os.getpid(), True, PLAN)
        assert run.record_job_id == f"pid{os.getpid()}"
    assert read_local_runs(tmp_path) == ()


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError), note(tmp_path):
        raise MeasurementError("the loss is not finite")
    (run,) = read_local_runs(tmp_path)
    assert (run.exit_code, run.error, run.is_running) == (1, "the loss is not finite", False)


def killed_run(root: Path) -> None:
    with note(root):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_that_is_killed_is_not_taken_for_running(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=killed_run, args=(tmp_path,))
    process.start()
    process.join()
    (run,) = read_local_runs(tmp_path)
    assert (run.exit_code, run.is_running) == (None, False)


def test_a_number_that_another_process_has_now_is_not_the_run(tmp_path: Path) -> None:
    with note(tmp_path):
        (path,) = (tmp_path / FOLDER).iterdir()
        (run,) = read_local_runs(tmp_path)
        path.write_text(run.model_copy(update={"process_start_ticks": 1}).model_dump_json())
        (other,) = read_local_runs(tmp_path)
        assert other.is_running is False
        path.write_text(run.model_copy(update={"host": "elsewhere"}).model_dump_json())
        (other,) = read_local_runs(tmp_path)
        assert other.is_running is None


def test_slurm_knows_its_jobs_without_a_note(tmp_path: Path) -> None:
    with note(tmp_path, env={"SLURM_JOB_ID": "7"}):
        assert read_local_runs(tmp_path) == ()


def test_a_note_that_is_being_written_is_passed_over(tmp_path: Path) -> None:
    with note(tmp_path):
        (tmp_path / FOLDER / "half.json").write_text('{"process_id":')
        assert len(read_local_runs(tmp_path)) == 1


def test_a_run_is_cancelled(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from tests.launch.test_local_runs import note\n"
        "with note(Path(sys.argv[1])): print('up', flush=True); time.sleep(600)"
    )
    with subprocess.Popen((sys.executable, "-c", code, str(tmp_path)), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        cancel_local(tmp_path, process.pid)
        assert process.wait() == -signal.SIGTERM
    (run,) = read_local_runs(tmp_path)
    assert run.is_cancelled
    with pytest.raises(BadInputError, match="has ended meanwhile: there is nothing to cancel"):
        cancel_local(tmp_path, process.pid)
