"""One run as a scheduler sees it: what to run, on which site, how many nodes and ranks, and for how long."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe_bench.errors import BadInputError, MissingRequirementError
from moe_bench.launch.site import Site
from moe_bench.spec.recipe import Recipe

STARTUP_S = 900.0
"""Room for what comes before the first step: pulling an image, imports, NCCL, building the model."""
TIME_LIMIT_MARGIN = 2.0
"""Published H100 rows of one model and layout differ by 1.5 (Qwen3-235B, 256 GPUs: 214 to 320 TFLOPs)."""
TIME_LIMIT_STEP_S = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSize:
    """What a job holds. One rank per GPU; one rank per process where there are no GPUs."""

    num_nodes: int
    tasks_per_node: int
    gpus_per_node: int

    @property
    def num_tasks(self) -> int:
        """Ranks of the whole job."""
        return self.num_nodes * self.tasks_per_node

    def __str__(self) -> str:
        unit = "GPUs" if self.gpus_per_node else "processes"
        nodes = "1 node" if self.num_nodes == 1 else f"{self.num_nodes} nodes"
        return f"{nodes} x {self.tasks_per_node} {unit}"


def job_size(recipe: Recipe, *, num_nodes: int | None = None) -> JobSize:
    """The fewest nodes that divide the recipe's ranks evenly, or `num_nodes`.

    Raises BadInputError where that many nodes cannot hold them.
    """
    num_ranks, per_node = recipe.parallel.num_gpus, recipe.system.gpus_per_node
    fewest = math.ceil(num_ranks / per_node)
    if num_nodes is None:
        num_nodes = next(n for n in range(fewest, num_ranks + 1) if num_ranks % n == 0)
    if num_ranks % num_nodes or num_nodes < fewest:
        raise BadInputError(
            f"--nodes {num_nodes}: {recipe.name} has {num_ranks} ranks, at most {per_node} per node; "
            f"take a divisor of {num_ranks} from {fewest} on"
        )
    tasks_per_node = num_ranks // num_nodes
    return JobSize(
        num_nodes=num_nodes,
        tasks_per_node=tasks_per_node,
        gpus_per_node=0 if recipe.system.gpu is None else tasks_per_node,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A recipe on its way to a cluster."""

    recipe: Recipe
    """The recipe as it will run: scale and `--set` are already applied."""
    run_args: tuple[str, ...]
    """What follows `moe-bench run`: the recipe's name as typed, `--scale`, `--set` and the like."""
    site_name: str
    site: Site
    size: JobSize
    num_nodes_asked: int | None = None
    expected_step_s: float | None = None

    @property
    def name(self) -> str:
        """Name in the queue and in the log's file name."""
        return self.recipe.name.replace("/", ".")

    @property
    def site_file(self) -> str:
        """Where the site's facts stand: the path that was given, or the file of its name."""
        is_path = self.site_name.endswith((".yaml", ".yml"))
        return self.site_name if is_path else f"slurm/sites/{self.site_name}.yaml"

    @property
    def image(self) -> str | None:
        """Where the image lies that the recipe names, or else the site; None for the bare environment.

        Raises MissingRequirementError where the site has no container runtime or no such image.
        """
        container = self.recipe.container or self.site.default_container
        if container is None:
            return None
        if self.site.runtime == "bare":
            raise MissingRequirementError(
                f"{self.recipe.name} runs in container {container!r}, site {self.site_name!r} has none; "
                f"give {self.site_file} a `runtime` and `images`, or --set container=null"
            )
        if container not in self.site.images:
            raise MissingRequirementError(
                f"site {self.site_name!r} names no image for container {container!r}; "
                f"add it under `images` in {self.site_file}"
            )
        return self.site.images[container]

    @property
    def rank_env(self) -> dict[str, str]:
        """Variables of every rank, sorted: the recipe's and the site's; BadInputError where they disagree."""
        for name in self.recipe.env.keys() & self.site.env.keys():
            if self.recipe.env[name] != self.site.env[name]:
                raise BadInputError(
                    f"{name}: {self.recipe.env[name]!r} in the recipe, {self.site.env[name]!r} in site "
                    f"{self.site_name!r}; remove it from one of them"
                )
        return dict(sorted((self.recipe.env | self.site.env).items()))

    def require_startable(self) -> None:
        """Raise now, before it queues, what would stop the job in its first second."""
        _ = self.image, self.rank_env

    @property
    def time_limit_s(self) -> int:
        """start-up + margin x steps x expected step time, in whole five minutes; else the site's limit."""
        if self.expected_step_s is None:
            return self.site.time_limit_s
        num_steps = self.recipe.steps.num_warmup + self.recipe.steps.num_timed
        wanted_s = STARTUP_S + TIME_LIMIT_MARGIN * num_steps * self.expected_step_s
        return math.ceil(wanted_s / TIME_LIMIT_STEP_S) * TIME_LIMIT_STEP_S
