from moe_bench.launch.environment import allocation_from, clean_environment

JOB = {
    "SLURM_JOB_ID": "12",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "16",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_JOB_PARTITION": "batch",
}


def test_a_job_inherits_nothing_of_the_job_that_submits_it() -> None:
    shell = JOB | {"PATH": "/bin", "NCCL_ALGO": "Ring", "PYTHONPATH": "/old", "SLURM_MEM_PER_CPU": "100"}
    assert clean_environment(shell, also=(), python="/p") == {
        "PATH": "/bin",
        "MOE_BENCH_PYTHON": "/p",
        "MOE_BENCH_SIZED": "1",
    }


def test_a_site_may_pass_variables_on() -> None:
    assert clean_environment({"https_proxy": "x"}, also=("https_proxy",), python="/p")["https_proxy"] == "x"


def test_a_users_defaults_for_sbatch_are_kept() -> None:
    shell = {"SBATCH_ACCOUNT": "me", "SLURM_CONF": "/etc/slurm.conf", "SBATCH_EXPORT": "NONE"}
    assert clean_environment(shell, also=(), python="/p").keys() >= {"SBATCH_ACCOUNT", "SLURM_CONF"}
    assert "SBATCH_EXPORT" not in clean_environment(shell, also=(), python="/p")


def test_outside_slurm_there_is_no_allocation() -> None:
    assert allocation_from({"PATH": "/bin"}) is None


def test_a_job_knows_its_size() -> None:
    allocation = allocation_from(JOB)
    assert allocation is not None
    assert (allocation.job_id, allocation.num_nodes, allocation.num_tasks) == (12, 2, 16)
    assert (allocation.gpus_per_node, allocation.partition, allocation.is_sized) == (8, "batch", False)
    assert allocation.num_restarts == 0


def test_a_job_knows_how_often_it_was_queued_again() -> None:
    allocation = allocation_from(JOB | {"SLURM_RESTART_COUNT": "2"})
    assert allocation is not None
    assert allocation.num_restarts == 2


def test_a_job_that_asked_for_neither_tasks_nor_gpus_has_one_task_per_node() -> None:
    job = {key: value for key, value in JOB.items() if key not in ("SLURM_NTASKS", "SLURM_GPUS_ON_NODE")}
    allocation = allocation_from(job)
    assert allocation is not None
    assert (allocation.num_tasks, allocation.gpus_per_node) == (2, 0)
