import pytest

from moe_bench.errors import MissingRequirementError
from moe_bench.launch.rendezvous import (
    first_host,
    master_port,
    node_address,
    rendezvous_from,
)
from moe_bench.spec.rendezvous import Rendezvous
from tests.launch.conftest import FakeRunner

BATCH_SCRIPT = {"SLURM_JOB_ID": "12", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
SRUN_TASK = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_NODEID": "1",
}
TORCHRUN_WORKER = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "11",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "3",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
}
NO_COMMANDS = FakeRunner({}, code=1, stderr="must not be asked")


def rank_11(master_addr: str, master_port: int) -> Rendezvous:
    return Rendezvous(
        rank=11,
        world_size=16,
        local_rank=3,
        master_addr=master_addr,
        master_port=master_port,
    )


def test_a_process_that_nobody_started_as_a_rank_has_no_rendezvous() -> None:
    assert rendezvous_from({"PATH": "/bin"}, NO_COMMANDS) is None


def test_a_batch_script_is_no_rank_though_it_has_a_procid() -> None:
    assert rendezvous_from(BATCH_SCRIPT, NO_COMMANDS) is None


def test_an_interactive_step_is_no_rank() -> None:
    assert rendezvous_from(SRUN_TASK | {"SLURM_STEP_ID": "4294967290"}, NO_COMMANDS) is None


def test_a_lone_task_starts_its_own_ranks() -> None:
    assert rendezvous_from(SRUN_TASK | {"SLURM_STEP_NUM_TASKS": "1"}, NO_COMMANDS) is None


def test_a_task_of_srun_meets_where_the_launch_line_says() -> None:
    task = SRUN_TASK | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "12345"}
    assert rendezvous_from(task, NO_COMMANDS) == rank_11("10.0.0.1", 12345)


def test_a_task_of_a_plain_srun_meets_on_the_first_host() -> None:
    scontrol = FakeRunner({"scontrol show hostnames n[1-2]": "n1\nn2\n"})
    assert rendezvous_from(SRUN_TASK, scontrol) == rank_11("n1", 10012)


def test_a_task_that_cannot_tell_where_to_meet_says_what_to_set() -> None:
    scontrol = FakeRunner({}, code=127, stderr="scontrol: not installed here")
    with pytest.raises(MissingRequirementError, match="not installed here; set MASTER_ADDR"):
        rendezvous_from(SRUN_TASK, scontrol)


def test_torchrun_inside_an_srun_task_is_the_one_that_counts() -> None:
    task = {**SRUN_TASK, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", **TORCHRUN_WORKER}
    assert rendezvous_from(task, NO_COMMANDS) == rank_11("n1", 29500)


def test_the_port_stays_below_the_range_of_outgoing_connections() -> None:
    assert {master_port(0), master_port(19_999), master_port(20_000)} == {10_000, 29_999}


def test_the_first_host_of_a_list_is_slurms_own_reading_of_it() -> None:
    assert first_host("n[3,1]", FakeRunner({"show hostnames n[3,1]": "n3\nn1\n"})) == "n3"


def test_a_node_is_reached_at_the_address_that_slurm_uses() -> None:
    answer = "NodeName=n1 Arch=x86_64\n   NodeAddr=10.1.2.3 NodeHostName=host Version=22.05.8\n"
    assert node_address("n1", FakeRunner({"scontrol show node n1": answer})) == "10.1.2.3"
