"""One line per recipe: what `list` prints, and the label by which other tables name a layout."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from moe_bench.spec.recipe import Recipe


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


def recipe_table(recipes: Iterable[Recipe]) -> Table:
    """One line per recipe."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("recipe", "layout", "seq", "GBS", "kernels", "dispatch", "reproduces"):
        table.add_column(heading, overflow="fold")
    for recipe in recipes:
        table.add_row(
            recipe.name,
            layout_label(recipe),
            str(recipe.seq_len),
            str(recipe.global_batch_size),
            recipe.kernels.family,
            recipe.dispatch.dispatcher,
            recipe.reproduces or "",
        )
    return table


def recipe_line(recipe: Recipe) -> dict[str, object]:
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
        "reproduces": recipe.reproduces,
    }
