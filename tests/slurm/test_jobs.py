"""`moe-bench jobs` under a real Slurm: every state that a job can reach without cgroups is seen."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.conftest import Slurm
from tests.slurm.test_run_recipe import SCRIPT, TOY, python_whose_ranks

pytestmark = pytest.mark.slurm

SLEEP = "echo rank $SLURM_PROCID is up; exec sleep 600"
TORCH_OOM = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.50 GiB."


class User:
    """Somebody at the shell of a login node."""

    def __init__(self, slurm: Slurm, checkout: Path, home: Path) -> None:
        self.slurm, self.checkout, self.home = slurm, checkout, home

    def types(self, *words: str, **env: str) -> tuple[int, str, str]:
        """Exit code, output and errors of `moe-bench words`."""
        done = self.slurm.run(
            sys.executable, "-m", "moe_bench", *words, cwd=self.home, PYTHONPATH=str(self.checkout), **env
        )
        return done.returncode, done.stdout, done.stderr

    def submits(self, ranks_do: str, *options: str) -> str:
        """The number of a job over both nodes whose ranks do that; `options` are sbatch's."""
        python = python_whose_ranks(self.home, ranks_do)
        (self.home / "site.yaml").write_text(f"sbatch_args: {json.dumps(options)}\n")
        words = ("submit", *TOY, "--nodes", "2", "--site", "site.yaml", "--json")
        code, output, errors = self.types(*words, MOE_BENCH_PYTHON=python)
        assert code == 0, errors
        return str(json.loads(output)["job_id"])

    def sees(self, job_id: str) -> dict[str, Any]:
        code, output, errors = self.types("jobs", "show", job_id, "--json")
        assert code == 0, errors
        found: dict[str, Any] = json.loads(output)
        return found

    def waits_for(self, job_id: str, state: str) -> dict[str, Any]:
        self.slurm.wait_until(lambda: self.sees(job_id)["state"] == state, f"job {job_id} is {state}")
        return self.sees(job_id)

    def ends(self, job_id: str) -> dict[str, Any]:
        self.slurm.ended(int(job_id))
        return self.sees(job_id)


@pytest.fixture
def user(slurm: Slurm, checkout: Path, home: Path) -> User:
    return User(slurm, checkout, home)


def test_jobs_that_wait_and_run_are_seen_read_and_cancelled(user: User) -> None:
    first = user.submits(SLEEP)
    user.waits_for(first, "running")
    user.slurm.wait_until(lambda: "rank 3 is up" in user.types("jobs", "log", first)[1], "all ranks are up")
    second = user.submits("exit 0", "--hold")
    waiting = user.sees(second)
    assert (waiting["state"], waiting["reason"], waiting["log"]) == ("submitted", "JobHeldUser", None)
    assert user.types("jobs", "log", second)[0] == 2
    code, output, _ = user.types("jobs", "cancel", first)
    assert code == 0
    assert output.startswith(f"cancelled job {first}: deepseek_v3/")
    assert user.ends(first)["state"] == "cancelled"
    code, _, errors = user.types("jobs", "cancel", first)
    assert (code, errors) == (2, f"job {first} is cancelled: there is nothing to cancel\n")
    assert user.slurm.run("scontrol", "release", second).returncode == 0
    done = user.ends(second)
    assert (done["state"], done["reason"]) == ("done", "it left no record below these results")
    listed = json.loads(user.types("jobs", "--json")[1])
    assert {first: "cancelled", second: "done"}.items() <= {job["id"]: job["state"] for job in listed}.items()


def test_a_job_that_fails_says_with_which_code_and_its_last_words(user: User) -> None:
    job = user.ends(user.submits("echo DeepEP is not installed >&2; exit 3"))
    assert job["state"] == "failed"
    assert job["reason"].startswith("exit code 3, something needed is not here: ")


def test_a_job_whose_rank_runs_out_of_gpu_memory_is_told_from_other_failures(user: User) -> None:
    job = user.ends(user.submits(f"echo '[rank'$SLURM_PROCID']: {TORCH_OOM}' >&2; exit 1"))
    assert job["state"] == "out of memory"
    assert job["reason"].endswith(TORCH_OOM)
    listed = json.loads(user.types("jobs", "--state", "out of memory", "--json")[1])
    assert job["id"] in [one["id"] for one in listed]


def test_a_job_that_is_queued_again_is_seen_so(user: User) -> None:
    job_id = user.submits(SLEEP)
    user.waits_for(job_id, "running")
    assert user.slurm.run("scontrol", "requeue", job_id).returncode == 0
    again = user.waits_for(job_id, "requeued")
    assert "life 2" in again["reason"]
    assert user.types("jobs", "cancel", job_id)[0] == 0
    assert user.ends(job_id)["state"] == "cancelled"


def test_a_job_that_runs_out_of_time_is_told_from_one_that_was_cancelled(user: User) -> None:
    job_id = user.submits(SLEEP)
    user.waits_for(job_id, "running")
    assert user.slurm.run("scontrol", "update", f"JobId={job_id}", "EndTime=now+1seconds").returncode == 0
    job = user.ends(job_id)
    assert job["state"] == "timed out"
    # what is left to say it once Slurm has forgotten the job
    assert "DUE TO TIME LIMIT" in user.types("jobs", "log", job_id)[1]


def test_a_job_that_was_asked_for_by_hand_is_known_while_it_runs(user: User) -> None:
    python = python_whose_ranks(user.home, "echo rank $SLURM_PROCID is up; exit 5")
    job_id = user.slurm.sbatch(
        "--nodes=2", "--ntasks-per-node=2", str(user.checkout / SCRIPT), *TOY, "--nodes", "2",
        cwd=user.home, MOE_BENCH_PYTHON=python,
    )  # fmt: skip
    job = user.ends(str(job_id))
    assert (job["state"], job["job_size"]) == ("failed", "2 nodes x 2 processes")
    assert job["reason"].startswith("exit code 5, a gate failed: ")
    assert "rank 3 is up" in user.types("jobs", "log", str(job_id))[1]
