"""slurm/run_recipe.sh under a real Slurm: the literal command, failure, refusal, cancel and requeue."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import NODES, Slurm

pytestmark = pytest.mark.slurm

SCRIPT = "slurm/run_recipe.sh"
TOY = ("deepseek_v3", "--scale", "smoke")
"""DeepSeek-V3 at toy size: PP2 x EP2, four ranks."""


def python_whose_ranks(folder: Path, do: str) -> str:
    """An interpreter for which `-m moe_bench run` is the shell line `do`, and all else the real thing."""
    path = folder / "python"
    path.write_text(
        f'#!/bin/bash\nif [ "$1 $2 $3" = "-m moe_bench run" ]; then\n{do}\nfi\nexec {sys.executable} "$@"\n'
    )
    path.chmod(0o755)
    return str(path)


def sized_job(slurm: Slurm, submitter: int) -> int:
    """The job that the submitter, which has ended well, says it has queued."""
    fields = slurm.ended(submitter)
    output = slurm.output(submitter)
    assert (fields["JobState"], fields["ExitCode"]) == ("COMPLETED", "0:0"), output
    assert output.startswith("submitted job "), output
    return int(output.split()[2].rstrip(":"))


def records(checkout: Path) -> dict[str, Path]:
    """The records below `checkout` by the number of their job."""
    paths = (checkout / "results").glob("deepseek_v3/*/*.json")
    return {path.stem.rpartition("-job")[2]: path for path in paths}


def state(fields: dict[str, str]) -> tuple[str, str]:
    return fields["JobState"], fields["ExitCode"]


def test_the_literal_command_runs_the_recipe_over_two_nodes(slurm: Slurm, checkout: Path, home: Path) -> None:
    submitter = slurm.sbatch(str(checkout / SCRIPT), *TOY, "--nodes", "2", cwd=home)
    job_id = sized_job(slurm, submitter)
    told = slurm.output(submitter)
    assert "deepseek_v3/cpu_host_4g_bf16 on 2 nodes x 2 processes, site default\n" in told
    assert f"scancel {job_id}\n" in told
    fields = slurm.ended(job_id)
    output = slurm.output(job_id)
    assert state(fields) == ("COMPLETED", "0:0"), output
    assert (fields["NumNodes"], fields["NumTasks"]) == ("2", "4")
    assert fields["StdOut"] == str(home / f"slurm-deepseek_v3.cpu_host_4g_bf16-{job_id}.out")
    assert "step time" in output
    assert "substitutions" in output
    record = json.loads(records(checkout)[str(job_id)].read_text())
    assert len(record["samples"]["step_times_s"]) == 4
    assert len(records(checkout)) == 1
    told = slurm.run(sys.executable, "-m", "moe_bench", "jobs", "show", str(job_id), PYTHONPATH=str(checkout))
    assert "done" in told.stdout
    assert records(checkout)[str(job_id)].name in told.stdout.replace("\n", "").replace(" ", "")


def test_torchrun_meets_across_nodes_too(slurm: Slurm, checkout: Path, home: Path) -> None:
    site = home / "site.yaml"
    site.write_text("launcher: torchrun\n")
    submitter = slurm.sbatch(
        str(checkout / SCRIPT),
        "qwen3_30b_a3b",
        "--scale",
        "smoke",
        "--nodes",
        "2",
        "--site",
        "site.yaml",
        cwd=home,
    )
    job_id = sized_job(slurm, submitter)
    assert state(slurm.ended(job_id)) == ("COMPLETED", "0:0"), slurm.output(job_id)
    assert "step time" in slurm.output(job_id)


def test_the_sized_job_has_a_clean_environment(slurm: Slurm, checkout: Path, home: Path) -> None:
    python = python_whose_ranks(home, f"env > {home}/rank$SLURM_PROCID; exit 0")
    submitter = slurm.sbatch(
        "--mem-per-cpu=1", str(checkout / SCRIPT), *TOY, "--nodes", "2",
        cwd=home, MOE_BENCH_PYTHON=python, NCCL_ALGO="Tree", SECRET_TOKEN="x",
    )  # fmt: skip
    assert state(slurm.ended(sized_job(slurm, submitter))) == ("COMPLETED", "0:0")
    ranks = [(home / f"rank{rank}").read_text() for rank in range(4)]
    assert [f"SLURM_NODEID={node}\n" in ranks[rank] for rank, node in enumerate((0, 0, 1, 1))] == [True] * 4
    for unwanted in ("NCCL_ALGO", "SECRET_TOKEN", "SLURM_MEM_PER_CPU"):
        assert not [rank for rank in ranks if unwanted in rank]
    for wanted in ("MASTER_ADDR=127.0.0.1\n", f"PYTHONPATH={checkout}\n"):
        assert [rank for rank in ranks if wanted in rank] == ranks


def test_a_job_that_is_asked_for_with_the_right_size_runs_in_place(
    slurm: Slurm, checkout: Path, home: Path
) -> None:
    python = python_whose_ranks(home, "echo rank $SLURM_PROCID of $SLURM_STEP_NUM_TASKS; exit 0")
    job_id = slurm.sbatch(
        "--nodes=2", "--ntasks-per-node=2", str(checkout / SCRIPT), *TOY, "--nodes", "2",
        cwd=home, MOE_BENCH_PYTHON=python,
    )  # fmt: skip
    assert state(slurm.ended(job_id)) == ("COMPLETED", "0:0")
    assert sorted(slurm.output(job_id).splitlines()) == [f"rank {rank} of 4" for rank in range(4)]


def test_a_failing_run_gives_the_job_its_code_and_state(slurm: Slurm, checkout: Path, home: Path) -> None:
    python = python_whose_ranks(home, "exit 3")
    submitter = slurm.sbatch(str(checkout / SCRIPT), *TOY, "--nodes", "2", cwd=home, MOE_BENCH_PYTHON=python)
    assert state(slurm.ended(sized_job(slurm, submitter))) == ("FAILED", "3:0")


def test_a_killed_rank_ends_the_job_with_code_1_and_leaves_no_process(
    slurm: Slurm, checkout: Path, home: Path
) -> None:
    python = python_whose_ranks(home, "[ $SLURM_PROCID != 1 ] || kill -9 $$\nexec sleep 600")
    submitter = slurm.sbatch(str(checkout / SCRIPT), *TOY, "--nodes", "2", cwd=home, MOE_BENCH_PYTHON=python)
    job_id = sized_job(slurm, submitter)
    assert state(slurm.ended(job_id)) == ("FAILED", "1:0")
    assert "task 1: Killed" in slurm.output(job_id)
    assert "a rank was killed" in slurm.output(job_id)
    assert slurm.tasks(*NODES) == []


def test_a_submitter_that_waits_ends_with_the_code_of_the_run(
    slurm: Slurm, checkout: Path, home: Path
) -> None:
    python = python_whose_ranks(home, "exit 5")
    # one node is the waiting submitter's
    submitter = slurm.sbatch(
        str(checkout / SCRIPT), *TOY, "--nodes", "1", cwd=home, MOE_BENCH_PYTHON=python, MOE_BENCH_WAIT="1"
    )
    assert state(slurm.ended(submitter)) == ("FAILED", "5:0")
    assert slurm.output(submitter).startswith("submitted job ")


def test_a_refusal_ends_with_code_4_and_the_command_to_type(slurm: Slurm, checkout: Path, home: Path) -> None:
    changes = ("--set", "kernels.family=torch_native", "--set", "dispatch.dispatcher=alltoall")
    submitter = slurm.sbatch(str(checkout / SCRIPT), "deepseek_v3", *changes, cwd=home)
    assert state(slurm.ended(submitter)) == ("FAILED", "4:0")
    refusal, command = slurm.output(submitter).splitlines()
    assert refusal.startswith("sbatch: error: ")
    assert refusal.endswith("to submit it from a login node, type:")
    assert " --nodes=32 --ntasks-per-node=8 " in command
    assert slurm.run("bash", "-c", command).stderr.startswith("sbatch: error: ")


def test_what_no_code_runs_is_told_by_the_submitter_and_not_queued(
    slurm: Slurm, checkout: Path, home: Path
) -> None:
    submitter = slurm.sbatch(str(checkout / SCRIPT), "qwen3_30b_a3b", cwd=home)  # CUDA graphs
    assert state(slurm.ended(submitter)) == ("FAILED", "3:0")
    assert slurm.output(submitter).endswith("nothing was queued\n")


def test_a_mistake_in_the_recipe_is_told_by_the_submitter(slurm: Slurm, checkout: Path, home: Path) -> None:
    submitter = slurm.sbatch(str(checkout / SCRIPT), "deepseek_v33", cwd=home)
    assert state(slurm.ended(submitter)) == ("FAILED", "2:0")
    assert "did you mean 'deepseek_v3'" in slurm.output(submitter)


def test_cancelling_leaves_no_process(slurm: Slurm, checkout: Path, home: Path) -> None:
    python = python_whose_ranks(home, f"touch {home}/up$SLURM_PROCID\nexec sleep 600")
    submitter = slurm.sbatch(str(checkout / SCRIPT), *TOY, "--nodes", "2", cwd=home, MOE_BENCH_PYTHON=python)
    job_id = sized_job(slurm, submitter)
    slurm.wait_until(lambda: len(list(home.glob("up*"))) == 4, "all ranks are up")
    assert len(slurm.tasks(*NODES)) >= 4
    slurm.run("scancel", str(job_id))
    assert slurm.ended(job_id)["JobState"] == "CANCELLED"
    slurm.wait_until(lambda: not slurm.tasks(*NODES), "no process is left")


def test_a_job_whose_first_node_dies_is_queued_again_and_ends_well(
    slurm: Slurm, checkout: Path, home: Path
) -> None:
    python = python_whose_ranks(
        home, f'[ -z "$SLURM_RESTART_COUNT" ] || exit 0\ntouch {home}/up$SLURM_PROCID\nexec sleep 600'
    )
    submitter = slurm.sbatch(str(checkout / SCRIPT), *TOY, "--nodes", "2", cwd=home, MOE_BENCH_PYTHON=python)
    requeued_once(slurm, sized_job(slurm, submitter), home, dying="n1")


def test_a_job_whose_ranks_notice_a_dead_node_before_slurm_does_is_queued_again_too(
    slurm: Slurm, checkout: Path, home: Path
) -> None:
    (home / "site.yaml").write_text("srun_args: [--wait=1]\n")
    python = python_whose_ranks(
        home,
        f'[ -z "$SLURM_RESTART_COUNT" ] || exit 0\ntouch {home}/up$SLURM_PROCID\n'
        f"until [ -e {home}/peer_is_gone ]; do sleep 0.1; done\nexit 1",
    )
    submitter = slurm.sbatch(
        str(checkout / SCRIPT), *TOY, "--nodes", "2", "--site", "site.yaml", cwd=home, MOE_BENCH_PYTHON=python
    )
    job_id = sized_job(slurm, submitter)
    requeued_once(slurm, job_id, home, dying="n2")
    assert f"a node of job {job_id} was lost; the job is queued again" in slurm.output(job_id)


def requeued_once(slurm: Slurm, job_id: int, home: Path, *, dying: str) -> None:
    """Kill a node under the job, bring it back, and see the job end well in its second life."""
    slurm.wait_until(lambda: len(list(home.glob("up*"))) == 4, "all ranks are up")
    slurm.kill_node(dying)
    (home / "peer_is_gone").touch()
    slurm.wait_until(lambda: slurm.job(job_id)["Restarts"] == "1", "the job is queued again")
    slurm.start_node(dying)
    fields = slurm.ended(job_id)
    assert (*state(fields), fields["Restarts"]) == ("COMPLETED", "0:0", "1"), slurm.output(job_id)
