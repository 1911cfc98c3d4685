import shlex
import stat
from pathlib import Path

import pytest

from moe_bench.launch.ledger import read_ledger
from moe_bench.launch.submit import Submission
from moe_bench.launch.variants import PlannedJob
from moe_bench.launch.verbs import Outcome, job_verb, runs_with_this_python, submit_verb
from moe_bench.spec.scale import full_plan
from tests.launch.conftest import recipe_of

REPOSITORY = Path(__file__).parents[2]


def planned(*run_args: str, repeat: int = 0) -> PlannedJob:
    plan = full_plan(recipe_of(), modified=("seed=1",))
    return PlannedJob(plan=plan, run_args=run_args, repeat=repeat, file=None)


def test_a_dry_run_prints_the_command_and_queues_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "/no programs/here")
    asked = planned("tiny", "--set", "seed=1")
    outcome = submit_verb(
        asked,
        job_verb(asked, data_root=REPOSITORY, site="default", num_nodes=None),
        data_root=REPOSITORY,
        results_root=tmp_path,
        dry_run=True,
        inside_job=False,
    )
    assert outcome.exit_code == 0
    assert outcome.submission is None
    assert list(read_ledger(tmp_path)) == []
    assert tuple(shlex.split(outcome.lines[0])) == outcome.command
    assert outcome.as_json() == {"command": outcome.command}
    assert "PATH=/no programs/here" in outcome.command
    assert outcome.command[-6:] == (
        str(REPOSITORY / "slurm" / "run_recipe.sh"), "tiny", "--set", "seed=1", "--site", "default"
    )  # fmt: skip


def test_a_queued_job_stands_in_the_ledger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 41\n")
    sbatch.chmod(sbatch.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    asked = planned("tiny", "--set", "seed=1", "--repeat", "2", repeat=2)
    submit_verb(
        asked,
        job_verb(asked, data_root=REPOSITORY, site="default", num_nodes=None),
        data_root=REPOSITORY,
        results_root=tmp_path,
        dry_run=False,
        inside_job=False,
    )
    (job,) = read_ledger(tmp_path)
    assert (job.job_id, job.plan, job.repeat, job.job_size) == (41, asked.plan, 2, "2 nodes x 8 GPUs")
    assert job.log.endswith("-41.out")
    assert job.command[-4:] == ("--repeat", "2", "--site", "default")


def test_the_json_of_a_submission_says_how_to_follow_it() -> None:
    submission = Submission(
        job_id=5, job_size="2 nodes x 8 GPUs", command=("sbatch",), log="/l", follow=("scancel 5",)
    )
    assert Outcome(submission=submission).as_json() == {
        "job_id": 5,
        "job_size": "2 nodes x 8 GPUs",
        "command": ("sbatch",),
        "log": "/l",
        "follow": ("scancel 5",),
    }


def test_without_a_job_there_is_nothing_to_wait_for() -> None:
    assert Outcome(exit_code=3).wait() == 3


def test_a_job_runs_with_this_python_unless_an_image_or_another_one_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MOE_BENCH_PYTHON", raising=False)
    bare = job_verb(planned("tiny"), data_root=REPOSITORY, site="default", num_nodes=None)
    contained = job_verb(planned("tiny"), data_root=REPOSITORY, site="example_pyxis", num_nodes=None)
    assert runs_with_this_python(bare, data_root=REPOSITORY)
    assert not runs_with_this_python(contained, data_root=REPOSITORY)
    monkeypatch.setenv("MOE_BENCH_PYTHON", "/shared/env/bin/python")
    assert not runs_with_this_python(bare, data_root=REPOSITORY)
