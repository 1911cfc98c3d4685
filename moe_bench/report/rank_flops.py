"""What the kernels of one rank multiply in a step, from the closed form: by stage, kernel and pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rich.table import Table

from moe_bench.analysis.rank_flops import Kernel, RankFlops, rank_flops
from moe_bench.report.figures import TERA
from moe_bench.spec.recipe import Recipe


def stage_flops(recipe: Recipe) -> tuple[tuple[RankFlops, ...], ...]:
    """The lines of every pipeline rank, in order."""
    return tuple(rank_flops(recipe, rank) for rank in range(recipe.parallel.pipeline))


def rank_flops_view(stages: Sequence[tuple[RankFlops, ...]]) -> Table:
    """One line per stage and kind of kernel."""
    table = Table(
        box=None,
        pad_edge=False,
        header_style="bold",
        title="TFLOPs that each rank's kernels spend per step (closed form)",
        title_justify="left",
    )
    for heading in ("stage", "kernel", "forward", "dgrad", "wgrad", "recompute", "total"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right")
    for rank, lines in enumerate(stages):
        for kernel in Kernel:
            of_kernel = [line for line in lines if line.kernel is kernel]
            if not of_kernel:
                continue
            passes = (
                sum(line.forward_flops for line in of_kernel),
                sum(line.dgrad_flops for line in of_kernel),
                sum(line.wgrad_flops for line in of_kernel),
                sum(line.recompute_flops for line in of_kernel),
            )
            cells = (*passes, sum(passes))
            table.add_row(str(rank), str(kernel), *(f"{flops / TERA:,.1f}" for flops in cells))
    return table


def rank_flops_json(recipe: Recipe, stages: Sequence[tuple[RankFlops, ...]]) -> dict[str, object]:
    """Every line of every stage, layer by layer and part by part."""
    return {
        "recipe": recipe.name,
        "num_micro_batches": recipe.num_micro_batches,
        "stages": [[dataclasses.asdict(line) for line in stage] for stage in stages],
    }
