import dataclasses

import pytest

from moe_bench.errors import BadInputError, MissingRequirementError
from moe_bench.launch.job import Job, JobSize, job_size
from tests.launch.conftest import job_of, recipe_of


def size(num_nodes: int, tasks_per_node: int, gpus_per_node: int) -> JobSize:
    return JobSize(num_nodes=num_nodes, tasks_per_node=tasks_per_node, gpus_per_node=gpus_per_node)


def test_a_job_takes_the_fewest_nodes_that_hold_its_gpus() -> None:
    assert job_size(recipe_of(parallel={"num_gpus": 256})) == size(32, 8, 8)
    assert job_size(recipe_of(parallel={"num_gpus": 4})) == size(1, 4, 4)


def test_nodes_of_four_gpus_are_counted_as_such() -> None:
    assert job_size(recipe_of("gb200_nvl72", parallel={"num_gpus": 64})) == size(16, 4, 4)


def test_every_node_gets_the_same_number_of_ranks() -> None:
    assert job_size(recipe_of(parallel={"num_gpus": 12})) == size(2, 6, 6)


def test_a_machine_without_gpus_is_asked_for_processes_alone() -> None:
    assert job_size(recipe_of("cpu_host", parallel={"num_gpus": 4}), num_nodes=2) == size(2, 2, 0)


@pytest.mark.parametrize("num_nodes", [1, 3, 32])
def test_nodes_that_cannot_hold_the_ranks_evenly_are_refused(num_nodes: int) -> None:
    with pytest.raises(BadInputError, match=f"--nodes {num_nodes}: .* 16 ranks, at most 8 per node"):
        job_size(recipe_of(), num_nodes=num_nodes)


def with_step(expected_step_s: float | None) -> Job:
    job = job_of(recipe_of(steps={"num_warmup": 10, "num_timed": 40}), time_limit_s=1234)
    return Job(
        recipe=job.recipe,
        run_args=job.run_args,
        site_name=job.site_name,
        site=job.site,
        size=job.size,
        expected_step_s=expected_step_s,
    )


def test_the_time_limit_is_startup_and_twice_the_expected_steps_in_whole_five_minutes() -> None:
    # 900 + 2 x 50 x 61.756 = 7075.6
    assert with_step(61.756).time_limit_s == 7200
    # 900 + 2 x 50 x 3 = 1200
    assert with_step(3.0).time_limit_s == 1200


def test_without_an_expectation_the_site_says_the_time_limit() -> None:
    assert with_step(None).time_limit_s == 1234


def test_recipe_and_site_both_reach_the_ranks_environment() -> None:
    job = job_of(recipe_of(env={"B": "1", "A": "2"}), env={"NCCL_IB_HCA": "mlx5"})
    assert list(job.rank_env.items()) == [("A", "2"), ("B", "1"), ("NCCL_IB_HCA", "mlx5")]


def test_a_site_may_not_overrule_a_recipe() -> None:
    job = job_of(recipe_of(env={"NCCL_IB_SL": "1"}), env={"NCCL_IB_SL": "2"})
    with pytest.raises(BadInputError, match="NCCL_IB_SL: '1' in the recipe, '2' in site 'here'"):
        _ = job.rank_env


def test_a_recipe_without_container_runs_bare_on_every_site() -> None:
    assert job_of(runtime="pyxis", images={"moe_bench": "/images/m.sqsh"}).image is None


def test_a_site_may_run_every_recipe_in_a_container() -> None:
    images = {"a": "/a.sqsh", "b": "/b.sqsh"}
    for recipe, image in ((recipe_of(), "/a.sqsh"), (recipe_of(container="b"), "/b.sqsh")):
        job = job_of(recipe, runtime="pyxis", images=images, default_container="a")
        assert job.image == image


@pytest.mark.parametrize(
    ("name", "file"), [("here", "slurm/sites/here.yaml"), ("my/site.yaml", "my/site.yaml")]
)
def test_what_a_site_lacks_is_to_be_written_into_its_own_file(name: str, file: str) -> None:
    job = dataclasses.replace(job_of(recipe_of(container="a"), runtime="pyxis"), site_name=name)
    with pytest.raises(MissingRequirementError, match=f"add it under `images` in {file}$"):
        _ = job.image


def test_a_container_needs_a_site_that_has_it() -> None:
    recipe = recipe_of(container="moe_bench")
    with pytest.raises(MissingRequirementError, match=r"site 'here' has none; .*--set container=null"):
        _ = job_of(recipe).image
    with pytest.raises(MissingRequirementError, match="names no image for container 'moe_bench'"):
        _ = job_of(recipe, runtime="pyxis").image
    assert job_of(recipe, runtime="pyxis", images={"moe_bench": "/images/m.sqsh"}).image == "/images/m.sqsh"
