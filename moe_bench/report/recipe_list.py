"""One line per recipe: what `list` prints, and the label by which other tables name a layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_bench.report.columns import Columns
from moe_bench.spec.recipe import Recipe

if TYPE_CHECKING:
    # what most tables want of this module is a label; parity takes longer to load than all of it
    from moe_bench.results.parity import Evidence

HEADINGS = ("recipe", "layout", "seq", "GBS", "dispatch", "kernels", "parity", "reproduces")


def layout_label(recipe: Recipe) -> str:
    """Parallel sizes above one, as `TP2 PP4 VPP8 EP64 DP8`."""
    parallel = recipe.parallel
    sizes = (
        ("TP", parallel.tensor),
        ("PP", parallel.pipeline),
        ("VPP", parallel.virtual_pipeline),
        ("CP", parallel.context),
        ("EP", parallel.expert),
        ("ETP", parallel.expert_tensor),
        ("DP", parallel.data),
    )
    label = " ".join(f"{name}{size}" for name, size in sizes if size > 1)
    return label + (" FSDP" if parallel.data_sharding == "megatron_fsdp" else "")


def parity_mark(evidence: Evidence | None) -> str:
    """How settings learn, in one word: `equal`, `partly`, `differs`, or `unproven`."""
    return "unproven" if evidence is None else evidence.verdict


def recipe_list(recipes: Sequence[Recipe], marks: Sequence[str], *, width: int | None) -> str:
    """One line per recipe under a line of headings, in at most `width` characters; None for no limit.

    `marks` say of each how its settings learn.

    Text, not a view: laying out a table takes as long as reading the recipes does.
    """
    return str(Columns(headings=HEADINGS, rows=tuple(map(_cells, recipes, marks))).lines(width))


def _cells(recipe: Recipe, mark: str) -> tuple[str, ...]:
    return (
        recipe.name,
        layout_label(recipe),
        str(recipe.seq_len),
        str(recipe.global_batch_size),
        recipe.dispatch.dispatcher,
        recipe.kernels.family,
        mark,
        recipe.reproduces or "",
    )


def recipe_line(recipe: Recipe, mark: str) -> dict[str, object]:
    """The same line as JSON."""
    return {
        "name": recipe.name,
        "model": recipe.model.display_name,
        "system": recipe.system.key,
        "num_gpus": recipe.parallel.num_gpus,
        "precision": recipe.precision,
        "layout": layout_label(recipe),
        "seq_len": recipe.seq_len,
        "global_batch_size": recipe.global_batch_size,
        "micro_batch_size": recipe.micro_batch_size,
        "kernels": recipe.kernels.family,
        "dispatcher": recipe.dispatch.dispatcher,
        "parity": mark,
        "reproduces": recipe.reproduces,
    }
