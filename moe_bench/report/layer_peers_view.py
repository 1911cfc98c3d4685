"""Engines side by side on one MoE layer, as people read it: ratios first, then who could not take part."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from moe_bench.report.columns import Columns
from moe_bench.report.figures import GIB, MILLI
from moe_bench.results.layer_peers import EngineResult, LayerPeers, Pass

_NONE = "-"
_SAYS_SO = "not installed"


def layer_peers_view(peers: LayerPeers) -> RenderableType:
    """A line for each engine that was measured, and one for each reason why others were not."""
    headings = (
        "engine",
        f"time / {peers.baseline}",
        "lowest to highest",
        "forward",
        "forward ms",
        "backward ms",
        "peak GiB",
        "off by",
        "package",
    )
    rows = tuple(_row(peers, one) for one in peers.engines if one.times is not None)
    return Group(
        Text(_what_was_compared(peers)),
        *(Text(line) for line in peers.differences),
        Text(),
        Columns(headings=headings, rows=rows, right=frozenset(headings[1:-1])),
        Text(),
        *(Text(line) for line in _left_out(peers)),
    )


def layer_peers_json(peers: LayerPeers) -> list[dict[str, object]]:
    """What the view computes from the record, by engine."""
    passes: tuple[Pass, ...] = ("forward", "forward and backward")
    return [
        {
            "engine": one.engine,
            "outcome": one.outcome,
            "ratios": {
                which: None if (ratio := peers.ratio(one.engine, which)) is None else ratio.model_dump()
                for which in passes
            },
        }
        for one in peers.engines
    ]


def _what_was_compared(peers: LayerPeers) -> str:
    case, moe = peers.case, peers.case.moe
    shared = f", shared {moe.shared_expert_ffn_hidden_size}" if moe.shared_expert_ffn_hidden_size else ""
    return (
        f"peers: {case.num_tokens} tokens x {case.hidden_size}, {moe.num_experts} experts, top-{moe.top_k}, "
        f"width {moe.expert_ffn_hidden_size}{shared}; {case.precision}; outputs and gradients of "
        f"{peers.num_checked_tokens} tokens within {peers.allowed_fraction:.2g} of float64"
    )


def _row(peers: LayerPeers, one: EngineResult) -> tuple[str, ...]:
    both = peers.ratio(one.engine, "forward and backward")
    forward = peers.ratio(one.engine, "forward")
    times, worst = one.times, one.worst
    rounds = () if times is None else times.rounds
    peak_bytes = None if times is None else times.peak_bytes
    return (
        one.engine,
        _NONE if both is None else f"{both.median_ratio:.2f}",
        _NONE if both is None else f"{both.lowest_ratio:.2f} to {both.highest_ratio:.2f}",
        _NONE if forward is None else f"{forward.median_ratio:.2f}",
        _milli(tuple(itertools.chain.from_iterable(samples.forward_s for samples in rounds))),
        _milli(tuple(itertools.chain.from_iterable(samples.backward_s for samples in rounds))),
        _NONE if peak_bytes is None else f"{peak_bytes / GIB:.2f}",
        _NONE if worst is None or worst.difference_fraction is None else f"{worst.difference_fraction:.1e}",
        f"{one.package} {one.version or ''}".strip(),
    )


def _left_out(peers: LayerPeers) -> Iterator[str]:
    """Engines by what keeps them out, in the order in which they stand."""
    reasons: dict[str, list[EngineResult]] = {}
    for one in peers.engines:
        if one.reason is not None:
            named = f"{one.outcome}: {one.reason}" if one.outcome != "unable" else one.reason
            reasons.setdefault(named, []).append(one)
    for reason, group in reasons.items():
        others = [one.engine for one in peers.engines if one not in group]
        absent = {one.engine for one in group if one.version is None and _SAYS_SO not in reason}
        names = _gathered([one.engine for one in group], others)
        yield ", ".join(f"{name} ({_SAYS_SO})" if name in absent else name for name in names) + f": {reason}"


def _gathered(names: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    """The names, those that share a beginning which none of the others has as `<beginning>*`."""
    gathered: dict[str, None] = {}
    for name in names:
        words = name.split("_")
        beginnings = ("_".join(words[:number]) + "_" for number in range(1, len(words)))
        sharing = {
            start: sum(other.startswith(start) for other in names)
            for start in beginnings
            if not any(other.startswith(start) for other in others)
        }
        start = max(sharing, key=lambda one: (sharing[one], len(one)), default="")
        gathered[f"{start}*" if sharing.get(start, 0) > 1 else name] = None
    return tuple(gathered)


def _milli(samples_s: tuple[float, ...]) -> str:
    return f"{statistics.median(samples_s) / MILLI:.3f}"
