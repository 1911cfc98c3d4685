"""What each rank holds at the fullest moment of a step, from the closed form, by category and tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from rich.console import Group
from rich.table import Table

from moe_bench.analysis.chunk_memory import ModelMemory
from moe_bench.analysis.memory import RankMemory
from moe_bench.report.figures import GIB, MIB
from moe_bench.spec.recipe import Recipe

_SMALLEST_SHOWN_BYTES = MIB // 2


def memory_view(recipe: Recipe, stages: Sequence[RankMemory]) -> Group:
    """A line per stage with every category that some stage has, and what one layer of each kind keeps."""
    table = _table("GiB at the fullest moment of a step (closed form)")
    categories = [
        name for name in stages[0].bytes_by_category if any(stage.bytes_by_category[name] for stage in stages)
    ]
    for heading in ("stage", *categories, "total"):
        table.add_column(heading, justify="right")
    table.add_column("fullest at")
    for stage in stages:
        sizes = (*(stage.bytes_by_category[name] for name in categories), stage.total_bytes)
        row = (f"{size / GIB:.2f}" for size in sizes)
        table.add_row(str(stage.pipeline_rank), *row, stage.peak_at)
    return Group(table, _kept_table(kept_tensors(recipe)))


def kept_tensors(recipe: Recipe) -> dict[str, dict[str, int]]:
    """Bytes that one micro batch leaves for its backward pass in a layer of each kind, by tensor."""
    model, memory = recipe.model, ModelMemory(recipe)
    is_recomputed = recipe.recompute.granularity == "full"
    kinds = {model.is_moe_layer(layer): layer for layer in range(model.num_layers)}
    return {
        "experts" if is_moe else "dense": dict(memory.layer(is_moe=is_moe, is_recomputed=is_recomputed).kept)
        for is_moe in sorted(kinds)
    }


def memory_json(recipe: Recipe, stages: Sequence[RankMemory]) -> dict[str, object]:
    """Every stage and what a layer keeps, in bytes."""
    return {
        "recipe": recipe.name,
        "stages": [dataclasses.asdict(stage) for stage in stages],
        "kept_bytes_per_layer_and_micro_batch": kept_tensors(recipe),
    }


def _kept_table(layers: Mapping[str, Mapping[str, int]]) -> Table:
    """The tensors in the order in which they are made; those that are small everywhere together."""
    table = _table("MiB kept per layer")
    table.add_column("tensor")
    for kind in layers:
        table.add_column(kind, justify="right")
    names = list(dict.fromkeys(name for kept in layers.values() for name in kept))
    small = {
        name for name in names if max(kept.get(name, 0) for kept in layers.values()) < _SMALLEST_SHOWN_BYTES
    }
    for name in names:
        if name not in small:
            table.add_row(name, *(_mib(kept.get(name, 0)) for kept in layers.values()))
    if small:
        table.add_row("smaller ones", *(_mib(sum(kept.get(n, 0) for n in small)) for kept in layers.values()))
    table.add_row("all", *(_mib(sum(kept.values())) for kept in layers.values()))
    return table


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:,.1f}" if num_bytes else ""


def _table(title: str) -> Table:
    return Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
