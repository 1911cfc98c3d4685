"""What one rank communicates in a step, from the closed form: by collective and group, and by stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Group as Parts
from rich.console import RenderableType
from rich.table import Table

from moe_bench.analysis.collectives import Phase
from moe_bench.analysis.comms import Transfer, step_transfers
from moe_bench.report.figures import GIGA
from moe_bench.spec.recipe import Recipe

_PASSES = (Phase.FORWARD, Phase.RECOMPUTE, Phase.BACKWARD)


def stage_transfers(recipe: Recipe) -> tuple[tuple[Transfer, ...], ...]:
    """The transfers of every pipeline rank, in order."""
    return tuple(step_transfers(recipe, rank) for rank in range(recipe.parallel.pipeline))


def comms_view(stages: Sequence[tuple[Transfer, ...]]) -> RenderableType:
    """The stage that carries most, line by line, and the totals of all stages."""
    totals = [sum(transfer.num_bytes for transfer in stage) for stage in stages]
    busiest = totals.index(max(totals))
    return Parts(_lines_table(stages[busiest], busiest), _stages_table(stages))


def _lines_table(transfers: Iterable[Transfer], stage: int) -> Table:
    """One line per collective, group and purpose; all micro batches and layers together."""
    title = f"GB that each rank of pipeline stage {stage} hands to collectives per step (closed form)"
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    for heading in ("group", "ranks", "collective", "what"):
        table.add_column(heading, justify="right" if heading == "ranks" else "left")
    for heading in ("calls", *_PASSES, "other", "total", "leaves the rank"):
        table.add_column(heading, justify="right")
    for (group, size, op, what), lines in _by_purpose(transfers).items():
        in_pass = {phase: sum(t.num_bytes for t in lines if t.phase is phase) for phase in _PASSES}
        total = sum(t.num_bytes for t in lines)
        table.add_row(
            group,
            str(size),
            op,
            what,
            f"{sum(t.num_calls for t in lines):,}",
            *(_gb(num_bytes) for num_bytes in (*in_pass.values(), total - sum(in_pass.values()))),
            _gb(total),
            _gb(sum(t.sent_bytes for t in lines)),
        )
    return table


def _stages_table(stages: Sequence[tuple[Transfer, ...]]) -> Table:
    """One line per stage, one column per group."""
    groups = list(dict.fromkeys(str(t.group) for stage in stages for t in stage))
    table = Table(
        box=None, pad_edge=False, header_style="bold", title="GB per rank and step", title_justify="left"
    )
    for heading in ("stage", *groups, "total", "leaves the rank"):
        table.add_column(heading, justify="right")
    for rank, stage in enumerate(stages):
        of_group = [sum(t.num_bytes for t in stage if str(t.group) == group) for group in groups]
        cells = (*of_group, sum(of_group), sum(t.sent_bytes for t in stage))
        table.add_row(str(rank), *(_gb(num_bytes) for num_bytes in cells))
    return table


def _by_purpose(transfers: Iterable[Transfer]) -> Mapping[tuple[str, int, str, str], list[Transfer]]:
    lines: dict[tuple[str, int, str, str], list[Transfer]] = {}
    for transfer in transfers:
        key = (str(transfer.group), transfer.group_size, str(transfer.op), transfer.what)
        lines.setdefault(key, []).append(transfer)
    return lines


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / GIGA:,.3f}" if num_bytes else "-"


def comms_json(recipe: Recipe, stages: Sequence[tuple[Transfer, ...]]) -> dict[str, object]:
    """Every line of every stage, layer by layer."""
    return {
        "recipe": recipe.name,
        "num_micro_batches": recipe.num_micro_batches,
        "stages": [[_line_json(transfer) for transfer in stage] for stage in stages],
    }


def _line_json(transfer: Transfer) -> dict[str, object]:
    return {
        "phase": str(transfer.phase),
        "place": transfer.place,
        "collective": str(transfer.op),
        "group": str(transfer.group),
        "group_size": transfer.group_size,
        "what": transfer.what,
        "num_calls": transfer.num_calls,
        "num_bytes": transfer.num_bytes,
        "sent_bytes": transfer.sent_bytes,
    }
