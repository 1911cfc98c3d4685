"""The default run of every model as a Markdown table, which README carries and a test keeps true."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from moe_bench.analysis.memory import memory_fit, needed_bytes
from moe_bench.report.figures import GIB
from moe_bench.report.recipe_list import layout_label
from moe_bench.results.published import row_by_id
from moe_bench.spec.recipe import Recipe

HEADINGS = (
    "recipe",
    "GPUs",
    "layout",
    "GiB per GPU (closed form)",
    "reproduces",
    "published tokens/s/GPU",
)


def defaults_markdown(recipes: Iterable[Recipe], published: Path) -> str:
    """One line per recipe; `published` is the folder of the registry."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|--:|---|--:|---|--:|"]
    lines += ["| " + " | ".join(_cells(recipe, published)) + " |" for recipe in recipes]
    return "\n".join(lines)


def _cells(recipe: Recipe, published: Path) -> tuple[str, ...]:
    tokens_per_s = None
    if recipe.reproduces is not None:
        tokens_per_s = row_by_id(published, recipe.reproduces).tokens_per_s_per_gpu
    fit = memory_fit(recipe)
    return (
        f"`{recipe.name}`",
        str(recipe.parallel.num_gpus),
        layout_label(recipe),
        f"{needed_bytes(fit.worst) / GIB:.0f} of {fit.usable_bytes / GIB:.0f}",
        recipe.reproduces or "-",
        "-" if tokens_per_s is None else f"{tokens_per_s:,.0f}",
    )
