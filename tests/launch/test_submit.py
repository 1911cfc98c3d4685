from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from moe_bench.errors import MeasurementError, MissingRequirementError, SchedulerError
from moe_bench.launch.environment import Allocation
from moe_bench.launch.slurm import Installation
from moe_bench.launch.submit import (
    cluster_name,
    command_to_submit,
    expected_step_s,
    plan_job,
    run_here,
    runs_here,
    submit,
    wait_for,
)
from moe_bench.spec.catalogue import recipes_root
from moe_bench.spec.family import scaled_recipe
from moe_bench.spec.load import Loader
from tests.launch.conftest import FakeRunner, job_of, recipe_of

REPOSITORY = Path(__file__).parents[2]
LOADER = Loader(root=recipes_root())
PUBLISHED = REPOSITORY / "results" / "published"
INSIDE = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_JOB_NODELIST": "n1",
    "SLURM_JOB_PARTITION": "short",
    "SLURM_JOB_ACCOUNT": "me",
}
FITTING = Allocation(
    job_id=12,
    node_list="n[1-2]",
    num_nodes=2,
    num_tasks=16,
    gpus_per_node=8,
    is_sized=True,
    num_restarts=0,
    partition=None,
    account=None,
)
SCONTROL = {"show hostnames n[1-2]": "n1\nn2\n", "show node n1": "NodeName=n1 NodeAddr=10.0.0.1"}


def test_a_submission_says_its_number_and_how_to_follow_it(installation: Installation) -> None:
    submission = submit(job_of(), installation, env={}, run=FakeRunner({"sbatch": "4711;alps\n"}))
    assert submission.job_id == 4711
    assert submission.job_size == "2 nodes x 8 GPUs"
    assert submission.follow == (
        "tail -n +1 -F /home/me/slurm-tiny.h100_sxm_16g_bf16-4711.out",
        "scontrol show job 4711",
        "scancel 4711",
    )


def test_what_is_run_is_what_the_dry_run_prints(installation: Installation) -> None:
    run = FakeRunner({"sbatch": "1\n"})
    submission = submit(job_of(), installation, env=INSIDE, run=run)
    assert submission.command == command_to_submit(job_of(), installation, INSIDE)
    assert run.commands == [" ".join(submission.command)]


def test_a_job_submitted_inside_a_job_keeps_partition_and_account(installation: Installation) -> None:
    assert "--partition=short --account=me" in " ".join(command_to_submit(job_of(), installation, INSIDE))
    assert "--partition" not in " ".join(command_to_submit(job_of(), installation, {}))


def test_a_refusal_has_the_schedulers_words_and_the_command_to_type(installation: Installation) -> None:
    run = FakeRunner({}, code=1, stderr="sbatch: error: invalid partition specified: batch\n")
    with pytest.raises(SchedulerError) as refusal:
        submit(job_of(), installation, env={}, run=run)
    words, command = str(refusal.value).split("\n")
    assert words == (
        "sbatch: error: invalid partition specified: batch; to submit it from a login node, type:"
    )
    assert command == " ".join(command_to_submit(job_of(), installation, {}))
    assert refusal.value.exit_code == 4


def test_a_site_that_forbids_it_is_not_even_asked_from_inside_a_job(installation: Installation) -> None:
    run = FakeRunner({"sbatch": "1\n"})
    job = job_of(submit_from_jobs=False)
    with pytest.raises(SchedulerError, match=r"forbids sbatch inside a job; .*type:\nenv .*sbatch .*tiny"):
        submit(job, installation, env=INSIDE, run=run)
    assert run.commands == []
    assert submit(job, installation, env={}, run=run).job_id == 1


def test_a_machine_without_slurm_is_a_missing_requirement(installation: Installation) -> None:
    with pytest.raises(MissingRequirementError, match="sbatch is not on this machine"):
        submit(job_of(), installation, env={}, run=FakeRunner({}, code=127, stderr="env: 'sbatch'"))


def test_a_job_of_exactly_the_right_size_runs_here() -> None:
    assert runs_here(job_of(), FITTING)
    assert runs_here(job_of(), replace(FITTING, is_sized=False))


@pytest.mark.parametrize(
    "wrong",
    [replace(FITTING, num_nodes=1), replace(FITTING, num_tasks=2), replace(FITTING, gpus_per_node=4)],
)
def test_a_job_of_the_wrong_size_is_only_the_submitter(wrong: Allocation) -> None:
    assert not runs_here(job_of(), replace(wrong, is_sized=False))
    with pytest.raises(SchedulerError, match="job 12 was submitted for 2 nodes x 8 GPUs and has"):
        runs_here(job_of(), wrong)


def test_outside_a_job_nothing_runs_here() -> None:
    assert not runs_here(job_of(), None)


def test_where_nodes_come_with_their_gpus_slurm_need_not_count_them() -> None:
    assert runs_here(job_of(gpu_request="none"), replace(FITTING, gpus_per_node=0))


@pytest.mark.parametrize("code", [0, 1, 2, 3, 5])
def test_the_jobs_exit_code_is_the_runs(code: int, installation: Installation) -> None:
    commands = []

    def run_live(command: Sequence[str]) -> int:
        commands.append(" ".join(command))
        return code

    assert run_here(job_of(), installation, FITTING, run=FakeRunner(SCONTROL), run_live=run_live) == code
    assert len(commands) == 1
    assert commands[0].startswith("srun --nodes=2 --ntasks=16 ")
    assert " MASTER_ADDR=10.0.0.1 MASTER_PORT=10012 " in commands[0]


def lost_node(*, refusal: str = "") -> FakeRunner:
    """A cluster on which the probe of the nodes fails, and which may refuse to queue a job again."""
    codes = {"srun --overlap": 1, "scontrol requeue": int(bool(refusal))}
    return FakeRunner(SCONTROL, codes=codes, stderr=refusal)


@pytest.mark.parametrize("code", [1, 143])
def test_a_job_that_lost_a_node_is_queued_again(code: int, installation: Installation) -> None:
    run = lost_node()
    with pytest.raises(MeasurementError, match="a node of job 12 was lost; the job is queued again"):
        run_here(job_of(), installation, FITTING, run=run, run_live=lambda _: code)
    assert run.commands[-2:] == [
        "srun --overlap --nodes=2 --ntasks=2 --ntasks-per-node=1 true",
        "scontrol requeue 12",
    ]


def test_a_site_that_does_not_queue_again_has_the_last_word(installation: Installation) -> None:
    run = lost_node(refusal="Requested operation is presently disabled for job 12\n")
    with pytest.raises(MeasurementError, match="was lost; Requested operation is presently disabled"):
        run_here(job_of(), installation, FITTING, run=run, run_live=lambda _: 1)


def test_a_job_is_not_queued_again_for_ever(installation: Installation) -> None:
    run = lost_node()
    with pytest.raises(MeasurementError, match="queued again 3 times already and ends here"):
        run_here(job_of(), installation, replace(FITTING, num_restarts=3), run=run, run_live=lambda _: 1)
    assert not [command for command in run.commands if "requeue" in command]


@pytest.mark.parametrize("code", [0, 2, 3])
def test_a_run_that_ended_by_itself_probes_no_node(code: int, installation: Installation) -> None:
    run = FakeRunner(SCONTROL)
    run_here(job_of(), installation, FITTING, run=run, run_live=lambda _: code)
    assert not [command for command in run.commands if command.startswith("srun")]


@pytest.mark.parametrize("code", [137, 143, 139])
def test_a_killed_rank_gives_no_valid_number(code: int, installation: Installation) -> None:
    with pytest.raises(MeasurementError, match=f"srun ended with {code}: a rank was killed"):
        run_here(job_of(), installation, FITTING, run=FakeRunner(SCONTROL), run_live=lambda _: code)


class Sequel:
    """Answers `scontrol show job` with one state after the other."""

    def __init__(self, *states: tuple[str, str]) -> None:
        self.states = list(states)

    def __call__(self, command: Sequence[str]) -> CompletedProcess[str]:
        assert " ".join(command) == "scontrol show job 5"
        state, code = self.states.pop(0)
        return FakeRunner({"": f"JobId=5\n   JobState={state} Reason=None\n   ExitCode={code}\n"})(command)


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [("COMPLETED", "0:0", 0), ("FAILED", "3:0", 3), ("CANCELLED", "0:15", 1), ("TIMEOUT", "0:0", 1)],
)
def test_waiting_ends_with_the_jobs_code(state: str, code: str, expected: int) -> None:
    pauses: list[float] = []
    run = Sequel(("PENDING", "0:0"), ("RUNNING", "0:0"), ("COMPLETING", "0:0"), (state, code))
    assert wait_for(5, run=run, sleep=pauses.append) == expected
    assert pauses == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("state", ["RESIZING", "STAGE_OUT", "SPECIAL_EXIT", "A_WORD_OF_A_LATER_SLURM"])
def test_waiting_goes_on_in_every_state_that_does_not_end_a_job(state: str) -> None:
    run = Sequel((state, "0:0"), ("COMPLETED", "0:0"))
    assert wait_for(5, run=run, sleep=lambda _: None) == 0


def test_waiting_for_a_job_that_slurm_has_forgotten_is_an_error() -> None:
    run = FakeRunner({}, code=1, stderr="slurm_load_jobs error: Invalid job id specified\n")
    with pytest.raises(SchedulerError, match="Invalid job id specified"):
        wait_for(5, run=run, sleep=lambda _: None)


def test_the_cluster_says_its_name_where_there_is_one() -> None:
    answer = (
        "Configuration data as of 2026-11-22\nClusterName             = alps\nCommunicationParameters = \n"
    )
    assert cluster_name(FakeRunner({"scontrol show config": answer})) == "alps"
    assert cluster_name(FakeRunner({}, code=127, stderr="scontrol: not installed here")) is None


def test_the_expected_step_time_comes_from_the_row_that_is_reproduced() -> None:
    row = "mbcard-deepseek-v3-h100-1024gpu-bf16-s4096"
    recipe = recipe_of(reproduces=row, global_batch_size=16384, parallel={"num_gpus": 1024})
    # the card prints 61.756 s and 1061.2 tokens/s/GPU: 16384 x 4096 / (1061.2 x 1024) = 61.76
    assert expected_step_s(recipe, PUBLISHED) == pytest.approx(61.756, rel=1e-3)
    halved = recipe.model_copy(update={"global_batch_size": 8192})
    assert expected_step_s(halved, PUBLISHED) == pytest.approx(61.756 / 2, rel=1e-3)


def test_a_member_of_a_family_is_expected_to_be_as_fast_per_gpu() -> None:
    row = "mbcard-deepseek-v3-h100-1024gpu-bf16-s4096"
    recipe = LOADER.recipe(LOADER.root / "deepseek_v3" / "h100_sxm_1024g_bf16.yaml")
    assert recipe.reproduces == row
    weak, strong = (scaled_recipe(recipe, 2048, strong=strong) for strong in (False, True))
    assert expected_step_s(weak, PUBLISHED) == expected_step_s(recipe, PUBLISHED)
    assert expected_step_s(strong, PUBLISHED) == pytest.approx(61.756 / 2, rel=1e-3)


def test_without_a_row_or_a_gpu_nothing_is_expected() -> None:
    assert expected_step_s(recipe_of(), PUBLISHED) is None
    assert expected_step_s(recipe_of("cpu_host", reproduces="any"), PUBLISHED) is None


def test_a_planned_job_has_its_site_size_and_arguments() -> None:
    job = plan_job(
        recipe_of(),
        run_args=("tiny", "--set", "seed=1"),
        data_root=REPOSITORY,
        site="example_pyxis",
        num_nodes=4,
        run=FakeRunner({}, code=1, stderr="must not be asked"),
    )
    assert (job.site_name, job.site.runtime, job.size.num_nodes) == ("example_pyxis", "pyxis", 4)
    assert job.run_args == ("tiny", "--set", "seed=1")


def test_what_cannot_start_is_not_queued() -> None:
    with pytest.raises(MissingRequirementError, match="site 'default' has none"):
        plan_job(
            recipe_of(container="moe_bench"),
            run_args=("tiny",),
            data_root=REPOSITORY,
            site="default",
            num_nodes=None,
            run=FakeRunner({}),
        )


def test_a_cluster_without_a_file_of_its_own_takes_the_default_site() -> None:
    run = FakeRunner({"scontrol show config": "ClusterName = alps\n"})
    job = plan_job(recipe_of(), run_args=("tiny",), data_root=REPOSITORY, site=None, num_nodes=None, run=run)
    assert job.site_name == "default"
