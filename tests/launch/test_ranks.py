"""Runs whose ranks are started one run after another: by what, with which commands, in how much room."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from moe_bench.errors import MeasurementError, MissingRequirementError
from moe_bench.launch.ranks import RankStarter, launcher_for
from moe_bench.spec.catalogue import data_root
from moe_bench.spec.rendezvous import Launcher
from moe_bench.spec.scale import Plan, full_plan
from tests.launch.conftest import FakeRunner, recipe_of

SLURM = FakeRunner(
    {
        "--list-gpus": "GPU 0: H100\nGPU 1: H100\n",
        "show hostnames": "n1\nn2\n",
        "show node": "NodeName=n1 NodeAddr=10.0.0.1 Port=1",
    }
)
IN_JOB = {
    **{"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"},
    **{"SLURM_NTASKS": "16", "SLURM_GPUS_ON_NODE": "8"},
}


def plan(num_gpus: int, system: str = "h100_sxm") -> Plan:
    return full_plan(recipe_of(system, parallel={"num_gpus": num_gpus}, env={"A": "1"}), modified=())


def starter(launcher: Launcher, *, code: int = 0, env: dict[str, str] | None = None) -> RankStarter:
    def run_live(command: Sequence[str]) -> int:
        return code

    return RankStarter(
        launcher=launcher, data_root=data_root(), site=None, env=env or {}, run=SLURM, run_live=run_live
    )


@pytest.mark.parametrize(
    ("sizes", "system", "env", "launcher"),
    [
        ((2, 1), "cpu_host", IN_JOB, None),
        ((2, 1), "h100_sxm", {}, "torchrun"),
        ((8, 1), "h100_sxm", IN_JOB, "torchrun"),
        ((8, 16), "h100_sxm", IN_JOB, "srun"),
        ((8, 16), "h100_sxm", {}, "torchrun"),
    ],
)
def test_several_nodes_of_a_job_are_sruns_and_one_machine_is_torchruns(
    sizes: tuple[int, ...], system: str, env: dict[str, str], launcher: str | None
) -> None:
    assert launcher_for([plan(size, system) for size in sizes], env) == launcher


def test_torchrun_starts_every_rank_here_with_the_recipes_variables() -> None:
    command = " ".join(starter("torchrun").command(plan(2), "parity-rank", ("run.json", "found.json")))
    assert command.startswith("env A=1 ")
    assert command.endswith("--nproc-per-node=2 --standalone -m moe_bench parity-rank run.json found.json")


def test_srun_starts_every_rank_on_as_many_nodes_as_the_run_needs() -> None:
    command = " ".join(starter("srun", env=IN_JOB).command(plan(8), "parity-rank", ("run.json",)))
    assert command.startswith("srun --nodes=1 --ntasks=8 --ntasks-per-node=8 ")
    assert " env A=1 MASTER_ADDR=10.0.0.1 MASTER_PORT=10007 " in command
    assert command.endswith("-m moe_bench parity-rank run.json")


@pytest.mark.parametrize(
    ("launcher", "env", "problem"),
    [
        ("torchrun", {}, "needs 32 GPUs and this machine has 2; take --scale node --num-gpus 2"),
        ("srun", IN_JOB, "needs 4 nodes x 8 GPUs, and job 7 has 2 nodes with 8 GPUs each"),
        ("srun", {}, "this process is in none; begin one with salloc"),
    ],
)
def test_too_little_room_is_found_before_the_first_rank_starts(
    launcher: Launcher, env: dict[str, str], problem: str
) -> None:
    with pytest.raises(MissingRequirementError, match=problem):
        starter(launcher, env=env).require_room(plan(32))


def test_a_run_whose_ranks_fail_is_no_measurement() -> None:
    starter("torchrun").start(plan(2), "parity-rank", ())
    with pytest.raises(MeasurementError, match="torchrun ended with 1; the lines of its ranks above"):
        starter("torchrun", code=1).start(plan(2), "parity-rank", ())
