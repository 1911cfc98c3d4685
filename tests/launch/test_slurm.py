import sys
from pathlib import Path

import pytest

from moe_bench.launch.job import Job
from moe_bench.launch.slurm import (
    Installation,
    log_path,
    sbatch_command,
    slurm_time,
    srun_command,
    this_installation,
)
from tests.launch.conftest import job_of, recipe_of

REPOSITORY = Path(__file__).parents[2]
SHELL = {"PATH": "/bin", "HOME": "/home/me", "NCCL_DEBUG": "INFO", "SLURM_JOB_ID": "7"}
CONTAINER = recipe_of(container="moe_bench", env={"NCCL_NVLS_ENABLE": "0"})


def sbatch(job: Job, installation: Installation) -> str:
    return " ".join(sbatch_command(job, installation, env=SHELL))


def srun(job: Job, installation: Installation) -> str:
    return " ".join(srun_command(job, installation, job_id=12, master_addr="10.0.0.1", master_port=10012))


def test_the_whole_command_that_queues_a_job(installation: Installation) -> None:
    assert sbatch(job_of(), installation) == (
        "env --ignore-environment HOME=/home/me MOE_BENCH_PYTHON=/repo/.venv/bin/python MOE_BENCH_SIZED=1 "
        "PATH=/bin "
        "sbatch --parsable --export=ALL --requeue --open-mode=append --job-name=tiny.h100_sxm_16g_bf16 "
        "--nodes=2 --ntasks-per-node=8 --time=1:00:00 --chdir=/home/me "
        "--output=/home/me/slurm-tiny.h100_sxm_16g_bf16-%j.out --gpus-per-node=8 --exclusive "
        "/repo/slurm/run_recipe.sh tiny --site here"
    )


def test_every_field_of_a_site_reaches_sbatch(installation: Installation) -> None:
    job = job_of(
        partition="batch",
        account="me",
        exclusive=False,
        gpu_request="gres",
        cpus_per_task=12,
        time_limit_s=5400,
        sbatch_args=["--constraint=h100"],
        pass_environment=["NCCL_DEBUG"],
    )
    assert sbatch(job, installation) == (
        "env --ignore-environment HOME=/home/me MOE_BENCH_PYTHON=/repo/.venv/bin/python MOE_BENCH_SIZED=1 "
        "NCCL_DEBUG=INFO PATH=/bin "
        "sbatch --parsable --export=ALL --requeue --open-mode=append --job-name=tiny.h100_sxm_16g_bf16 "
        "--nodes=2 --ntasks-per-node=8 --cpus-per-task=12 --time=1:30:00 --partition=batch --account=me "
        "--chdir=/home/me --output=/home/me/slurm-tiny.h100_sxm_16g_bf16-%j.out --gres=gpu:8 "
        "--constraint=h100 /repo/slurm/run_recipe.sh tiny --site here"
    )


def test_a_job_without_gpus_asks_for_none_and_keeps_its_nodes(installation: Installation) -> None:
    job = job_of(recipe_of("cpu_host", parallel={"num_gpus": 4}), num_nodes=2)
    assert sbatch(job, installation).endswith(
        "--nodes=2 --ntasks-per-node=2 --time=1:00:00 --chdir=/home/me "
        "--output=/home/me/slurm-tiny.cpu_host_4g_bf16-%j.out --exclusive "
        "/repo/slurm/run_recipe.sh tiny --nodes 2 --site here"
    )


@pytest.mark.parametrize(
    ("kind", "option"), [("gpus_per_node", "--gpus-per-node=8"), ("gres", "--gres=gpu:8")]
)
def test_gpus_are_asked_for_as_the_site_has_it(kind: str, option: str, installation: Installation) -> None:
    assert f" {option} " in sbatch(job_of(gpu_request=kind), installation)
    assert option not in sbatch(job_of(gpu_request="none"), installation)


def test_partition_and_account_of_the_submitting_job_serve_where_the_site_has_none(
    installation: Installation,
) -> None:
    named = job_of(partition="site_queue", account="site_account")
    for job, expected in ((job_of(), "--partition=mine --account=me"), (named, "--partition=site_queue")):
        command = sbatch_command(job, installation, env={}, partition="mine", account="me")
        assert f" {expected} " in " ".join(command)


def test_the_whole_command_that_starts_the_ranks(installation: Installation) -> None:
    assert srun(job_of(recipe_of(env={"NCCL_NVLS_ENABLE": "0"}), env={"NCCL_IB_SL": "1"}), installation) == (
        "srun --nodes=2 --ntasks=16 --ntasks-per-node=8 --distribution=block --export=ALL "
        "--kill-on-bad-exit=0 --wait=20 "
        "env MASTER_ADDR=10.0.0.1 MASTER_PORT=10012 NCCL_IB_SL=1 NCCL_NVLS_ENABLE=0 "
        "/repo/.venv/bin/python -m moe_bench run tiny"
    )


def test_the_ranks_of_a_pyxis_site(installation: Installation) -> None:
    job = job_of(
        CONTAINER,
        runtime="pyxis",
        images={"moe_bench": "/images/moe_bench.sqsh"},
        container_mounts=["/data:/data"],
        cpus_per_task=12,
        srun_args=["--mpi=none"],
    )
    assert srun(job, installation) == (
        "srun --nodes=2 --ntasks=16 --ntasks-per-node=8 --cpus-per-task=12 --distribution=block --export=ALL "
        "--kill-on-bad-exit=0 --wait=20 --mpi=none "
        "--container-image=/images/moe_bench.sqsh "
        "--container-mounts=/home/me:/home/me,/repo:/repo,/data:/data "
        "--container-workdir=/home/me "
        "env MASTER_ADDR=10.0.0.1 MASTER_PORT=10012 MOE_BENCH_CONTAINER=/images/moe_bench.sqsh "
        "NCCL_NVLS_ENABLE=0 PYTHONPATH=/repo python3 -m moe_bench run tiny"
    )


def test_the_ranks_of_an_apptainer_site(installation: Installation) -> None:
    job = job_of(CONTAINER, runtime="apptainer", images={"moe_bench": "/images/moe_bench.sif"})
    assert srun(job, installation) == (
        "srun --nodes=2 --ntasks=16 --ntasks-per-node=8 --distribution=block --export=ALL "
        "--kill-on-bad-exit=0 --wait=20 "
        "apptainer exec --nv --bind=/home/me:/home/me,/repo:/repo --pwd=/home/me /images/moe_bench.sif "
        "env MASTER_ADDR=10.0.0.1 MASTER_PORT=10012 MOE_BENCH_CONTAINER=/images/moe_bench.sif "
        "NCCL_NVLS_ENABLE=0 PYTHONPATH=/repo python3 -m moe_bench run tiny"
    )


def test_the_ranks_of_a_site_that_prefers_torchrun(installation: Installation) -> None:
    assert srun(job_of(launcher="torchrun", cpus_per_task=12), installation) == (
        "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=96 --distribution=block --export=ALL "
        "--kill-on-bad-exit=0 --wait=20 "
        "/repo/.venv/bin/python -m torch.distributed.run --nnodes=2 --nproc-per-node=8 "
        "--rdzv-backend=c10d --rdzv-id=12 --rdzv-endpoint=10.0.0.1:10012 -m moe_bench run tiny"
    )


def test_a_log_is_named_after_the_recipe_and_the_job(installation: Installation) -> None:
    assert log_path(job_of(), installation, job_id="12") == "/home/me/slurm-tiny.h100_sxm_16g_bf16-12.out"


@pytest.mark.parametrize(
    ("limit_s", "text"), [(300, "0:05:00"), (5400, "1:30:00"), (90061, "25:01:01"), (59, "0:00:59")]
)
def test_a_time_limit_is_written_as_slurm_reads_it(limit_s: int, text: str) -> None:
    assert slurm_time(limit_s) == text


def test_a_job_keeps_the_interpreter_that_submits_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wheel = Path("/site-packages/moe_bench/data")
    assert this_installation(wheel, {}) == Installation(
        script=wheel / "slurm" / "run_recipe.sh", python=sys.executable, workdir=tmp_path, source=None
    )
    assert this_installation(wheel, {"MOE_BENCH_PYTHON": "/p"}).python == "/p"
    assert this_installation(REPOSITORY, {}).source == REPOSITORY
