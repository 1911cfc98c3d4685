"""One recipe at many sizes: weak or strong scaling, the fabric that each size crosses, and slow steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist

from moe_bench.analysis.collectives import Group
from moe_bench.errors import BadInputError, RecipeError
from moe_bench.projection.constants import Constants
from moe_bench.projection.fabric import Fabric
from moe_bench.projection.forecast import Basis
from moe_bench.projection.step import Projection, project
from moe_bench.projection.work.load_choice import load_choice
from moe_bench.spec.family import scaled_recipe
from moe_bench.spec.recipe import Recipe

MAX_GPUS = 16_384
"""Of the published runs the largest has 16,384 GPUs (Llama 3, arXiv:2407.21783); beyond is no evidence."""


class Level(StrEnum):
    """The highest part of the fabric that a process group crosses, if jobs are placed without gaps."""

    GPU = "-"
    NVLINK = "NVLink"
    LEAF = "leaf"
    SPINE = "spine"
    CORE = "core"
    UNKNOWN = "network"
    """Above NVLink, where the system's file names no tiers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalePoint:
    """The recipe at one size."""

    projection: Projection
    efficiency_ratio: float
    """Tokens/s/GPU over those of the smallest size (report/scaling.py)."""
    p90_step_s: float
    """A step time that nine steps in ten keep; the projection's own is the median."""
    expert_level: Level
    data_level: Level
    """Of the group in which gradients of dense weights are reduced."""
    pipeline_level: Level

    @property
    def num_gpus(self) -> int:
        """Of the job."""
        return self.projection.recipe.parallel.num_gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedSize:
    """A size that no member of the family has, and the first rule that it breaks."""

    num_gpus: int
    rule: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleOut:
    """A curve of projected points, and the sizes that it has not."""

    points: tuple[ScalePoint, ...]
    """Smallest first; the first is the reference."""
    refused: tuple[RefusedSize, ...]
    is_strong: bool


def scale_out(
    recipe: Recipe,
    sizes: Sequence[int],
    *,
    strong: bool,
    changes: tuple[str, ...] = (),
    basis: Basis | None = None,
    load: str | None = None,
) -> ScaleOut:
    """Members of the recipe's scaling family (spec/family.py) at `sizes`, each projected.

    `changes` as in `scaled_recipe`, `load` as in `load_choice`. Raises RecipeError where no size is legal,
    BadInputError for one above MAX_GPUS.
    """
    basis = Basis() if basis is None else basis
    efficiency = basis.efficiency(recipe.system)
    projections, refused = [], []
    error: RecipeError | None = None
    for size in sorted(set(sizes)):
        if size > MAX_GPUS:
            raise BadInputError(
                f"--num-gpus {size}: no published run is that large; write at most {MAX_GPUS:,}"
            )
        try:
            own = () if size == recipe.parallel.num_gpus else changes
            member = scaled_recipe(recipe, size, strong=strong, changes=own)
        except RecipeError as caught:
            error = error or caught
            first = caught.mistakes[0]
            refused.append(RefusedSize(num_gpus=size, rule=f"{first.key}: {first.problem}; {first.fix}"))
            continue
        ratio = load_choice(member, load).busiest_over_mean_ratio
        projections.append(project(member, constants=basis.constants, efficiency=efficiency, load=ratio))
    if error is not None and not projections:
        raise error
    base_tokens_per_s = projections[0].tokens_per_s_per_gpu
    points = tuple(
        _point(projection, projection.tokens_per_s_per_gpu / base_tokens_per_s, basis.constants)
        for projection in projections
    )
    return ScaleOut(points=points, refused=tuple(refused), is_strong=strong)


def _point(projection: Projection, efficiency_ratio: float, constants: Constants) -> ScalePoint:
    recipe = projection.recipe
    return ScalePoint(
        projection=projection,
        efficiency_ratio=efficiency_ratio,
        p90_step_s=quantile_s(projection, 0.9, constants),
        expert_level=level(recipe, Group.EXPERT),
        data_level=level(recipe, Group.DATA_CONTEXT),
        pipeline_level=level(recipe, Group.PIPELINE),
    )


def quantile_s(projection: Projection, probability: float, constants: Constants) -> float:
    """The step time that a share `probability` of steps keeps, from the spread that makes ranks wait.

    Rank times are normal with deviation s T, T being the step without waiting; a job of n ranks waits for the
    largest of them. That one follows Gumbel's law with scale s T / a, a = sqrt(2 ln n), as n grows (Fisher
    and Tippett 1928). The projection's step, T (1 + s a), is taken for its median, so

        t_q = T (1 + s (a + (g(q) - g(1/2)) / a)),   g(q) = -ln(-ln q)

    and of a single rank t_q = T (1 + s z_q) with the normal quantile z_q.
    """
    num_gpus = projection.recipe.parallel.num_gpus
    sigma = constants.straggler_std
    reach = math.sqrt(2 * math.log(num_gpus))
    alone_s = projection.step_s / (1 + sigma * reach)
    if num_gpus == 1:
        return alone_s * (1 + sigma * NormalDist().inv_cdf(probability))
    return alone_s * (1 + sigma * (reach + (_gumbel(probability) - _gumbel(0.5)) / reach))


def _gumbel(probability: float) -> float:
    return -math.log(-math.log(probability))


def level(recipe: Recipe, group: Group) -> Level:
    """The highest part of the fabric between the first and the last rank of a group."""
    system = recipe.system
    span = Fabric(system, recipe.parallel).span(group)
    if span.num_ranks == 1:
        return Level.GPU
    if span.num_domains == 1:
        return Level.NVLINK
    if system.fabric is None:
        return Level.UNKNOWN
    num_domains = _reach_domains(recipe, group)
    if num_domains <= system.fabric.leaf_domains:
        return Level.LEAF
    return Level.SPINE if num_domains <= system.fabric.spine_domains else Level.CORE


def _reach_domains(recipe: Recipe, group: Group) -> int:
    """NVLink domains from the group's first rank to its last, those of other groups between them included."""
    parallel = recipe.parallel
    per_stage = parallel.num_gpus // parallel.pipeline
    ranks = {
        Group.EXPERT: parallel.expert_tensor * parallel.expert,
        Group.DATA_CONTEXT: per_stage,
        Group.PIPELINE: parallel.num_gpus,
    }[group]
    return -(-ranks // Fabric(recipe.system, parallel).domain_ranks)
