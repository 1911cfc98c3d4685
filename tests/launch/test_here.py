from collections.abc import Sequence

import pytest

from moe_bench.errors import MissingRequirementError
from moe_bench.launch.here import num_gpus_here, repeat_ranks_here, require_gpus_here, start_ranks_here
from moe_bench.spec.family import scaled_plan
from moe_bench.spec.scale import full_plan
from tests.launch.conftest import FakeRunner, recipe_of

TWO_GPUS = FakeRunner(
    {
        "nvidia-smi --list-gpus": "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-a)\n"
        "  MIG 1g.10gb Device 0: (UUID: MIG-x)\nGPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-b)\n"
    }
)
NO_DRIVER = FakeRunner({}, code=127, stderr="nvidia-smi: not installed here")


def test_gpus_are_counted_as_the_driver_lists_them() -> None:
    assert num_gpus_here(TWO_GPUS) == 2
    assert num_gpus_here(NO_DRIVER) == 0


def test_enough_gpus_make_this_process_torchrun() -> None:
    started: list[str] = []

    def execute(program: str, command: tuple[str, ...]) -> None:
        started.append(f"{program}: {' '.join(command[1:])}")

    plan = full_plan(recipe_of(parallel={"num_gpus": 2}, env={"A": "1"}), modified=())
    require_gpus_here(plan, run=TWO_GPUS)
    start_ranks_here(plan, run_args=("tiny",), execute=execute)
    assert len(started) == 1
    assert started[0].startswith("env: A=1 ")
    assert started[0].endswith("--nproc-per-node=2 --standalone -m moe_bench run tiny")


@pytest.mark.parametrize(
    ("machine", "advice"),
    [(NO_DRIVER, "has 0; run a smaller one with --scale smoke"), (TWO_GPUS, "--scale node --num-gpus 2")],
)
def test_too_few_gpus_are_a_missing_requirement_that_says_what_would_run(
    machine: FakeRunner, advice: str
) -> None:
    with pytest.raises(MissingRequirementError, match=f"needs 16 GPUs and this machine .*{advice}"):
        require_gpus_here(full_plan(recipe_of(), modified=()), run=machine)


def test_the_command_that_is_offered_asks_for_the_same_run() -> None:
    changed = full_plan(recipe_of(), modified=("steps.num_timed=3",))
    on_a_node = changed.model_copy(update={"scale": "node"})
    larger = scaled_plan(changed, 32, strong=True)
    for plan, words in (
        (changed, "--set steps.num_timed=3`"),
        (on_a_node, "--scale node --num-gpus 16 --set steps.num_timed=3`"),
        (larger, f"{changed.asked} --num-gpus 32 --strong --set steps.num_timed=3`"),
    ):
        with pytest.raises(MissingRequirementError) as raised:
            require_gpus_here(plan, run=NO_DRIVER)
        assert str(raised.value).endswith(words)


def test_a_slice_needs_one_gpu_and_offers_the_toy_where_there_is_none() -> None:
    plan = full_plan(recipe_of(), modified=()).model_copy(update={"scale": "slice"})
    require_gpus_here(plan, run=TWO_GPUS)
    with pytest.raises(MissingRequirementError, match=r"needs 1 GPU .* has 0; .*--scale tiny_slice"):
        require_gpus_here(plan, run=NO_DRIVER)
    started: list[str] = []
    start_ranks_here(plan, run_args=("tiny",), execute=lambda _, command: started.extend(command))
    assert "--nproc-per-node=1" in started


def test_repeats_start_all_ranks_afresh_each_time_and_stop_at_a_failure() -> None:
    started: list[str] = []
    codes = iter((0, 3, 0))

    def run_live(command: Sequence[str]) -> int:
        started.append(" ".join(command).partition(" -m moe_bench ")[2])
        return next(codes)

    plan = full_plan(recipe_of(parallel={"num_gpus": 2}), modified=())
    assert repeat_ranks_here(plan, run_args=("tiny",), num_repeats=3, run_live=run_live) == 3
    assert started == ["run tiny --repeat 0", "run tiny --repeat 1"]
