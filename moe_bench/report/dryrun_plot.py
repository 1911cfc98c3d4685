"""Memory of a dry run as a picture: a bar per pipeline rank, and one rank's memory over the step, as SVG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from moe_bench.harness.dryrun.outcome import DryRun, RankDryRun
from moe_bench.report.dryrun_view import NOT_COMPARED, bytes_by_category
from moe_bench.report.figures import GIB

_WIDTH, _HEIGHT = 960, 640
_LEFT, _RIGHT, _TOP = 64, 24, 56
_BARS_HEIGHT, _LINE_HEIGHT, _GAP = 260, 170, 70
COLOURS = {
    "weights": "#3b5b92",
    "gradients": "#6f8fc4",
    "optimizer states": "#a9bde0",
    "inputs": "#d9d2c0",
    "activations": "#c2691c",
    "recomputed": "#e0a15a",
    "backward": "#8b3a3a",
    "pipeline": "#5a8f5a",
    "optimizer step": "#8a7f9e",
    "synchronisation": "#b5b5b5",
}


def write_plot(run: DryRun, path: Path) -> None:
    """Write the picture of `run`; the timeline is that of the rank that holds most."""
    path.write_text(_svg(run), encoding="utf-8")


def _svg(run: DryRun) -> str:
    gpu = run.plan.recipe.system.gpu
    usable = None if gpu is None else gpu.usable_bytes
    ranks = [outcome.run for outcome in run.ranks]
    top = max([rank.peak.num_bytes for rank in ranks] + [usable or 0]) * 1.05
    fullest = max(ranks, key=lambda rank: rank.peak.num_bytes)
    parts = [
        _text(_LEFT, 24, f"{run.plan.asked}: peak memory without data", size=16),
        _text(_LEFT, 42, NOT_COMPARED, size=11, colour="#8b3a3a"),
        *_bars(ranks, usable, top),
        *_timeline(fullest, usable),
    ]
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif">\n'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>\n{body}\n</svg>\n'
    )


def _bars(ranks: Sequence[RankDryRun], usable: int | None, top: float) -> Iterator[str]:
    """Stacked bars, one per rank, with the line of what the GPU can hold."""
    bottom = _TOP + _BARS_HEIGHT
    yield from _axis(bottom, _BARS_HEIGHT, top)
    step = (_WIDTH - _LEFT - _RIGHT - 150) / len(ranks)
    for index, rank in enumerate(ranks):
        x, y = _LEFT + step * (index + 0.15), float(bottom)
        for name, num_bytes in bytes_by_category(rank).items():
            height = num_bytes / top * _BARS_HEIGHT
            y -= height
            yield (
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{step * 0.7:.1f}" height="{height:.1f}" '
                f'fill="{COLOURS[name]}"><title>{escape(name)}: {num_bytes / GIB:.2f} GiB</title></rect>'
            )
        middle = x + step * 0.35
        yield _text(middle, y - 4, f"{rank.peak.num_bytes / GIB:.1f}", size=10, anchor="middle")
        yield _text(middle, bottom + 14, f"PP{rank.pipeline_rank}", size=10, anchor="middle")
    if usable is not None:
        y = bottom - usable / top * _BARS_HEIGHT
        yield _line(_LEFT, y, _WIDTH - _RIGHT - 150, y, colour="black", dash="6 3")
        yield _text(_WIDTH - _RIGHT - 146, y + 4, f"usable {usable / GIB:.1f} GiB", size=11)
    for index, (name, colour) in enumerate(COLOURS.items()):
        y = bottom - 18 * index
        yield f'<rect x="{_WIDTH - _RIGHT - 146}" y="{y - 10:.0f}" width="12" height="12" fill="{colour}"/>'
        yield _text(_WIDTH - _RIGHT - 128, y, name, size=11)


def _timeline(rank: RankDryRun, usable: int | None) -> Iterator[str]:
    """Bytes held over the step, in the order of operator calls."""
    first = _TOP + _BARS_HEIGHT + _GAP
    bottom = first + _LINE_HEIGHT
    values = rank.timeline_bytes
    top = max([*values, usable or 0]) * 1.05
    title = f"rank {rank.rank} over {rank.num_micro_batches_run} micro batches and the optimizer's step"
    yield _text(_LEFT, first - 10, title, size=12)
    yield from _axis(bottom, _LINE_HEIGHT, top)
    width = _WIDTH - _LEFT - _RIGHT - 150
    points = " ".join(
        f"{_LEFT + width * index / max(1, len(values) - 1):.1f},{bottom - value / top * _LINE_HEIGHT:.1f}"
        for index, value in enumerate(values)
    )
    yield f'<polyline points="{points}" fill="none" stroke="#c2691c" stroke-width="1"/>'
    if usable is not None:
        y = bottom - usable / top * _LINE_HEIGHT
        yield _line(_LEFT, y, _LEFT + width, y, colour="black", dash="6 3")
    yield _text(_LEFT, bottom + 16, "operator calls, first to last", size=10)


def _axis(bottom: float, height: float, top: float) -> Iterator[str]:
    """GiB from 0 in at most eight steps, with faint lines across."""
    step_gib = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500) if top / GIB / step <= 8)
    for gib in range(0, int(top / GIB) + 1, step_gib):
        y = bottom - gib * GIB / top * height
        yield _line(_LEFT, y, _WIDTH - _RIGHT - 150, y, colour="#dddddd")
        yield _text(_LEFT - 6, y + 4, f"{gib}", size=10, anchor="end")
    yield _text(_LEFT - 6, bottom - height - 6, "GiB", size=10, anchor="end")


def _line(x1: float, y1: float, x2: float, y2: float, *, colour: str, dash: str = "none") -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-dasharray="{dash}"/>'
    )


def _text(x: float, y: float, text: str, *, size: int, anchor: str = "start", colour: str = "#222222") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">'
        f"{escape(text)}</text>"
    )
