"""Two settings of a recipe as people compare them: losses, what rounding explains, verdict, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from moe_bench.report.columns import Columns
from moe_bench.results.parity import Parity
from moe_bench.spec.scale import Plan

UNPROVEN = "unproven: nobody has shown that these settings learn like others; moe-bench parity RECIPE"
"""What the mark means."""
MAX_STEPS = 12
"""Of a table; all of them are in the record."""
_HEADINGS = ("step", "base", "variant", "difference", "tolerance")


def parity_view(parity: Parity, path: Path) -> RenderableType:
    """Some of the steps, the verdict, what the tolerance comes from, and where the record lies."""
    base = parity.base.plan
    num_ranks = [side.plan.num_ranks for side in (parity.base, parity.variant)]
    table = Columns(
        headings=_HEADINGS,
        rows=tuple(_row(parity, index) for index in steps_shown(parity)),
        right=frozenset(_HEADINGS),
    )
    notes = (
        verdict_text(parity),
        f"base {base.asked} at {base.scale} scale ({num_ranks[0]} processes), variant "
        f"{' '.join(parity.varied)} ({num_ranks[1]} processes)",
        f"tolerance: {len(parity.repeats)} repeats of the base whose first weights are off by "
        f"{parity.nudge_fraction:.2g} of themselves",
        f"record: {path}",
    )
    return Group(table, *(Text(note) for note in notes))


def verdict_text(parity: Parity) -> str:
    """`equal` with what could have been seen, or `differs` with the first step that does."""
    step = parity.first_different_step
    if step is None:
        last = parity.tolerances[-1] / parity.base.losses[-1]
        return (
            f"equal over {len(parity.base.losses)} steps; less than {last:.2g} of the loss would not be seen"
        )
    base, variant = parity.base.losses[step - 1], parity.variant.losses[step - 1]
    return (
        f"differs from step {step}: losses {base:.6f} and {variant:.6f}, apart by {abs(base - variant):.2g} "
        f"where rounding explains {parity.tolerances[step - 1]:.2g}"
    )


def steps_shown(parity: Parity) -> Sequence[int]:
    """Indices of at most about MAX_STEPS steps: evenly spread, the last, and the first that differs."""
    num_steps = len(parity.base.losses)
    shown = {*range(0, num_steps, -(-num_steps // MAX_STEPS)), num_steps - 1}
    first = parity.first_different_step
    return sorted(shown if first is None else shown | {first - 1})


def _row(parity: Parity, index: int) -> tuple[str, ...]:
    base, variant = parity.base.losses[index], parity.variant.losses[index]
    return (
        str(index + 1),
        f"{base:.6f}",
        f"{variant:.6f}",
        f"{variant - base:+.1e}",
        f"{parity.tolerances[index]:.1e}",
    )


def parity_json(parity: Parity, path: Path) -> dict[str, object]:
    """The record itself, with what follows from it."""
    return {
        "path": str(path),
        "is_equal": parity.is_equal,
        "first_different_step": parity.first_different_step,
        "tolerances": parity.tolerances,
        **parity.model_dump(mode="json"),
    }


def parity_mark(parity: Parity | None) -> str:
    """In a table of runs: `equal`, `differs`, or `unproven`."""
    if parity is None:
        return "unproven"
    return "equal" if parity.is_equal else "differs"


def parity_line(parity: Parity | None, plan: Plan) -> str:
    """What a run's own table says of the last comparison of its settings."""
    if parity is None:
        return UNPROVEN.replace("RECIPE", plan.asked)
    where = f"{parity.base.plan.scale} scale, {parity.provenance.started_at[:10]}"
    return f"{verdict_text(parity)} ({' '.join(parity.varied)}; {where})"
