"""One recipe or model for people: what it says, what follows from it, and what Megatron-Core is given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe_bench.analysis.memory import MemoryFit, memory_fit, needed_bytes
from moe_bench.analysis.memory_verdict import verdict
from moe_bench.analysis.size import CountedSize
from moe_bench.harness.mcore_config import MegatronArguments
from moe_bench.report.figures import GIB
from moe_bench.report.recipe_list import layout_label
from moe_bench.spec.scale import Plan, Substitution


def plan_view(plan: Plan, *, evidence: Mapping[str, str]) -> RenderableType:
    """A recipe key by key, without the model's and system's own files, and its substitutions.

    `evidence` says, by what it is of, what is known of the model and of how these settings learn.
    """
    recipe = plan.recipe
    parts: list[RenderableType] = [Text(f"{plan.asked} ({plan.scale} scale)", style="bold")]
    if plan.modified:
        parts.append(Text(f"modified: {', '.join(plan.modified)}", style="yellow"))
    head = {
        "model": recipe.model.display_name,
        "system": recipe.system.display_name,
        "layout": layout_label(recipe),
        "micro batches per rank": recipe.num_micro_batches,
        "tokens per step": f"{recipe.tokens_per_step:,}",
    }
    if not recipe.routing_is_causal:
        head["routing"] = "not causal: a token's experts depend on tokens behind it (docs/routers.md)"
    parts.append(_two_columns(head | dict(evidence)))
    if recipe.system.gpu is not None:
        parts.append(memory_table(memory_fit(recipe)))
    tree = recipe.model_dump(mode="json", exclude={"model", "system", "differences"}, exclude_defaults=True)
    parts.append(_two_columns(dict(_flat(tree))))
    for row in recipe.differences:
        parts.append(Text(f"its row says {row.field} = {row.row}, this recipe {row.recipe}: {row.why}"))
    if plan.substitutions:
        parts.append(substitution_table(plan.substitutions))
    return Group(*parts)


def memory_table(fit: MemoryFit) -> Table:
    """Closed form of the memory of each pipeline rank, in GiB."""
    sizes = f"{needed_bytes(fit.worst) / GIB:.1f} of {fit.usable_bytes / GIB:.1f} GiB usable"
    title = f"memory per GPU from the closed form: {verdict(fit)}, {sizes}"
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    for heading in (
        "stage",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "transient",
        "total",
        "with margins",
    ):
        table.add_column(heading, justify="right")
    for rank in fit.ranks:
        parts = (
            rank.weights_bytes,
            rank.gradients_bytes,
            rank.optimizer_bytes,
            rank.activations_bytes,
            rank.transient_bytes,
            rank.total_bytes,
            needed_bytes(rank),
        )
        table.add_row(str(rank.pipeline_rank), *(f"{part / GIB:.1f}" for part in parts))
    return table


def arguments_view(arguments: MegatronArguments) -> RenderableType:
    """Megatron-Core's arguments by object."""
    parts: list[RenderableType] = []
    for name, section in arguments.sections().items():
        parts.append(Text(name, style="bold"))
        parts.append(_two_columns(section))
    return Group(*parts)


def substitution_table(substitutions: Iterable[Substitution]) -> Table:
    """What was asked, what is used, and why."""
    table = Table(box=None, pad_edge=False, header_style="bold", title="substitutions", title_justify="left")
    for heading in ("field", "asked", "used", "why"):
        table.add_column(heading, overflow="fold")
    for row in substitutions:
        table.add_row(row.field, row.asked, row.used, row.why)
    return table


def size_view(size: CountedSize) -> RenderableType:
    """Parameters by part, and totals under every way of counting beside the published ones."""
    parts = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("part", "total", "active"):
        parts.add_column(heading, justify="left" if heading == "part" else "right")
    for part, total in size.total_by_part.items():
        parts.add_row(str(part), f"{total:,}", f"{size.active_by_part[part]:,}")
    counts = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("counted", "total", "of published", "active", "of published"):
        counts.add_column(heading, justify="left" if heading == "counted" else "right")
    for counting, total in size.total.items():
        active = size.active[counting]
        nearest = {size.nearest_total: " (nearest total)", size.nearest_active: " (nearest active)"}
        mark = (
            " (nearest)"
            if size.nearest_total == size.nearest_active == counting
            else nearest.get(counting, "")
        )
        counts.add_row(
            f"{counting}{mark}",
            f"{total:,}",
            f"{total / size.published_total:.1%}",
            f"{active:,}",
            "-" if size.published_active is None else f"{active / size.published_active:.1%}",
        )
    return Group(parts, counts)


def size_json(size: CountedSize) -> dict[str, object]:
    """`size_view` as JSON."""
    active = size.active[size.nearest_active]
    return {
        "total_by_part": {str(part): count for part, count in size.total_by_part.items()},
        "active_by_part": {str(part): count for part, count in size.active_by_part.items()},
        "mtp_total": size.mtp_total,
        "mtp_active": size.mtp_active,
        "total": {str(counting): count for counting, count in size.total.items()},
        "active": {str(counting): count for counting, count in size.active.items()},
        "published_total": size.published_total,
        "published_active": size.published_active,
        "nearest_total": str(size.nearest_total),
        "nearest_active": str(size.nearest_active),
        "total_ratio": size.total[size.nearest_total] / size.published_total,
        "active_ratio": None if size.published_active is None else active / size.published_active,
    }


def _two_columns(rows: Mapping[str, object]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for key, value in rows.items():
        table.add_row(key, "none" if value is None else str(value))
    return table


def _flat(tree: Mapping[str, object], prefix: str = "") -> Iterable[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, ", ".join(map(str, value)) if isinstance(value, list) else value
