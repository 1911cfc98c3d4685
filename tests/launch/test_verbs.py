import shlex
from pathlib import Path

import pytest

from moe_bench.launch.submit import Submission
from moe_bench.launch.verbs import Outcome, submit_verb
from tests.launch.conftest import recipe_of

REPOSITORY = Path(__file__).parents[2]


def test_a_dry_run_prints_the_command_and_queues_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/no programs/here")
    outcome = submit_verb(
        recipe_of(),
        run_args=("tiny", "--set", "seed=1"),
        data_root=REPOSITORY,
        site="default",
        num_nodes=None,
        dry_run=True,
        inside_job=False,
    )
    assert outcome.exit_code == 0
    assert outcome.submission is None
    assert tuple(shlex.split(outcome.lines[0])) == outcome.command
    assert outcome.as_json() == {"command": outcome.command}
    assert "PATH=/no programs/here" in outcome.command
    assert outcome.command[-6:] == (
        str(REPOSITORY / "slurm" / "run_recipe.sh"), "tiny", "--set", "seed=1", "--site", "default"
    )  # fmt: skip


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
