"""Published rows as a table: tokens/s/GPU first, TFLOPs/GPU as printed and as we count them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.text import Text

from moe_bench.report.columns import Columns
from moe_bench.report.figures import TERA
from moe_bench.results.contradictions import Contradiction
from moe_bench.results.flops_convention import OUR_COUNTING
from moe_bench.results.published import PublishedRow, model_key
from moe_bench.results.renormalised import renormalised
from moe_bench.spec.model import ModelSpec

Line = dict[str, str | int | float | None]

_TERMINAL = {
    "id": "row",
    "hardware": "GPU",
    "num_gpus": "GPUs",
    "precision": "precision",
    "tokens_per_s_per_gpu": "tokens/s/GPU",
    "tokens_per_s_basis": "from",
    "printed_tflops_per_gpu": "TFLOPs/GPU",
    "tflops_per_gpu": "in our count",
    "trust": "trust",
    "seq_len": "seq",
    "gbs": "GBS",
    "layout": "layout",
    "flops_convention": "printed count",
}
"""Columns of the terminal's table and their headings, the most important ones first."""
_NUMBERS = ("num_gpus", "tokens_per_s_per_gpu", "printed_tflops_per_gpu", "tflops_per_gpu", "seq_len", "gbs")


def published_lines(rows: Iterable[PublishedRow], models: Mapping[str, ModelSpec]) -> tuple[Line, ...]:
    """One line per row, by model, system and falling throughput."""
    lines = [published_line(row, models.get(model_key(row.model))) for row in rows]
    return tuple(
        sorted(
            lines,
            key=lambda line: (
                str(line["model"]),
                str(line["hardware"]),
                str(line["precision"]),
                -float(line["tokens_per_s_per_gpu"] or 0),
            ),
        )
    )


def published_line(row: PublishedRow, model: ModelSpec | None) -> Line:
    """What a table says of one row; `model` is None where `recipes/` has no such architecture."""
    ours = renormalised(row, model)
    return {
        "id": row.id,
        "model": row.model,
        "hardware": row.hardware,
        "num_gpus": row.num_gpus,
        "precision": row.precision,
        "layout": row_layout(row),
        "seq_len": row.seq_len,
        "mbs": row.mbs,
        "gbs": row.gbs,
        "dispatcher": row.dispatcher,
        "tokens_per_s_per_gpu": ours.tokens_per_s_per_gpu,
        "tokens_per_s_basis": ours.basis,
        "step_time_s": row.step_time_s,
        "printed_tflops_per_gpu": row.metrics.tflops_per_gpu,
        "flops_convention": row.flops_convention,
        "tflops_per_gpu": _tflops(ours.flops_per_s_per_gpu),
        "flops_counting": None if ours.flops_per_s_per_gpu is None else OUR_COUNTING,
        "trust": row.trust,
        "framework": row.framework,
        "version": row.version,
        "source": ", ".join(text for text in (row.source.repo, row.source.paper, row.source.path) if text)
        or row.source.url,
        "note": row.note,
    }


def row_sizes(row: PublishedRow) -> str:
    """Printed parallel sizes above one, as `TP2 PP8 VPP4 EP32`."""
    sizes = (
        ("TP", row.tp),
        ("PP", row.pp),
        ("VPP", row.vpp),
        ("CP", row.cp),
        ("EP", row.ep),
        ("ETP", row.etp),
    )
    return " ".join(f"{name}{size}" for name, size in sizes if size is not None and size > 1)


def row_layout(row: PublishedRow) -> str:
    """Printed parallel sizes, and FSDP where the row says so."""
    return row_sizes(row) + (f" {row.sharding.upper()}" if row.sharding in ("fsdp", "fsdp2") else "")


def published_view(lines: Sequence[Line]) -> RenderableType:
    """The lines for a terminal, and what a dash in the column of our count means."""
    num_ours = sum(line["tflops_per_gpu"] is not None for line in lines)
    return Group(
        Columns(
            headings=tuple(_TERMINAL.values()),
            rows=tuple(tuple(_text(line[column]) for column in _TERMINAL) for line in lines),
            right=frozenset(_TERMINAL[column] for column in _NUMBERS),
            is_stacked=True,
        ),
        Text(
            f"{len(lines)} rows; {num_ours} renormalised to {OUR_COUNTING}, the others keep what was "
            "printed: recipes/ has no architecture for them, or they print no sequence length or throughput",
            style="dim",
        ),
    )


def as_csv(lines: Iterable[Line]) -> str:
    """The whole table, unrounded."""
    rows = list(lines)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else ["id"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def check_view(found: Iterable[Contradiction], *, num_rows: int) -> RenderableType:
    """Contradictions by cause, those without one first; the first line counts them."""
    ordered = sorted(found, key=lambda one: (one.known is not None, one.check, _cause(one)))
    num_open = sum(one.known is None for one in ordered)
    parts: list[RenderableType] = [
        Text(
            f"{num_rows} rows: {len({one.row_id for one in ordered})} contradict themselves in "
            f"{len(ordered)} places; {num_open} without a known cause",
            style="bold",
        )
    ]
    for (check, cause), group in groupby(ordered, key=lambda one: (one.check, _cause(one))):
        parts.append(Text(f"\n{check}: {cause}"))
        parts += [Text(f"  {one.row_id}: {one.problem}", style="dim") for one in group]
    return Group(*parts)


def check_json(found: Iterable[Contradiction]) -> list[dict[str, str | None]]:
    """`check_view` as JSON: the contradictions, each with its known cause."""
    return [
        {
            "row": one.row_id,
            "check": one.check,
            "problem": one.problem,
            "cause": None if one.known is None else one.known.cause,
            "source": None if one.known is None else one.known.source,
        }
        for one in found
    ]


def _cause(one: Contradiction) -> str:
    return "NO KNOWN CAUSE" if one.known is None else f"{one.known.cause} ({one.known.source})"


def _tflops(flops_per_s: float | None) -> float | None:
    return None if flops_per_s is None else flops_per_s / TERA


def _text(value: str | float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return str(value)
