from moe_bench.launch.local import local_command
from moe_bench.spec.scale import full_plan
from tests.launch.conftest import recipe_of


def test_a_machine_without_gpus_runs_one_process_that_forks() -> None:
    plan = full_plan(recipe_of("cpu_host", parallel={"num_gpus": 4}), modified=())
    command = local_command(plan, run_args=("tiny", "--scale", "smoke"), python="python")
    assert " ".join(command) == "python -m moe_bench run tiny --scale smoke"


def test_gpus_get_one_rank_each_through_torchrun_with_the_recipes_environment() -> None:
    plan = full_plan(
        recipe_of(
            parallel={"num_gpus": 8}, env={"NCCL_NVLS_ENABLE": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        ),
        modified=(),
    )
    command = local_command(plan, run_args=("tiny", "--scale", "node", "--num-gpus", "8"), python="python")
    assert " ".join(command) == (
        "env CUDA_DEVICE_MAX_CONNECTIONS=1 NCCL_NVLS_ENABLE=0 "
        "python -m torch.distributed.run --nnodes=1 --nproc-per-node=8 --standalone "
        "-m moe_bench run tiny --scale node --num-gpus 8"
    )
