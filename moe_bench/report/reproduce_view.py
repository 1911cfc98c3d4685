"""The table of `reproduce`: at 120 columns at most 40 lines, the first counting the verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from moe_bench.report.columns import Columns
from moe_bench.report.compare import interval_json
from moe_bench.report.figures import rate_text
from moe_bench.report.reproduce import Reproduction, Verdict, verdict_counts
from moe_bench.results.renormalised import Basis

MAX_LINES = 40
_LINES_AROUND = 4
"""The counts, the headings, the number of hidden rows, the legend."""

LEGEND = (
    "tokens/s per GPU; ~ from TFLOPs or MFU; * steps of one run; inconclusive: runs that decide; "
    "projected: over published"
)


def reproduce_view(found: Sequence[Reproduction]) -> RenderableType:
    """One line per row and set of runs, as many as fit; `--json` has all of them."""
    shown = newest_sets(found, num_lines=MAX_LINES - _LINES_AROUND)
    table = Columns(
        headings=("recipe", "published", "ours", "ratio, 95 %", "verdict", "projected"),
        rows=tuple(
            (
                one.published.recipe,
                published_text(one),
                "-" if one.tokens_per_s_per_gpu is None else rate_text(one.tokens_per_s_per_gpu),
                ratio_text(one),
                verdict_text(one),
                "-" if one.projected_ratio is None else f"{one.projected_ratio:.2f}",
            )
            for one in shown
        ),
        right=frozenset(("published", "ours", "ratio, 95 %", "projected")),
        is_stacked=True,
    )
    parts: list[RenderableType] = [Text(summary_line(found), style="bold"), table]
    if len(found) > len(shown):
        parts.append(Text(f"and {len(found) - len(shown)} more: name recipes, or use --json", style="dim"))
    parts.append(Text(LEGEND, style="dim"))
    return Group(*parts)


def newest_sets(found: Sequence[Reproduction], *, num_lines: int) -> tuple[Reproduction, ...]:
    """As many of `found` as fit, in their order: the newest set of every recipe, then the second, and so on.

    A recipe that ran a hundred times does not push the others off the page.
    """
    num_before: Counter[str] = Counter()
    ages = []
    for index, one in enumerate(found):
        ages.append((num_before[one.published.recipe], index))
        num_before[one.published.recipe] += 1
    return tuple(found[index] for index in sorted(index for _, index in sorted(ages)[:num_lines]))


def summary_line(found: Sequence[Reproduction]) -> str:
    """How many of the rows have which verdict; plain words where nothing was run at full scale."""
    counts = verdict_counts(found)
    total = sum(counts.values())
    if not any(one.scale == "full" for one in found):
        have = "row has" if total == 1 else "rows have"
        return f"no full-scale result yet: {total} published {have} a recipe, none was run here"
    parts = [f"{count} {verdict}" for verdict, count in counts.items() if count]
    return f"{total} published row{'' if total == 1 else 's'}: {', '.join(parts)}"


def verdict_text(one: Reproduction) -> str:
    """The verdict in at most 27 characters, with what matters most beside it."""
    if one.verdict is Verdict.NOT_RUN:
        return "-"
    if one.verdict is Verdict.NONE:
        return f"none: {one.scale} scale" if one.scale != "full" else "none: no throughput"
    if one.verdict is Verdict.INCONCLUSIVE:
        return f"inconclusive: {one.because[0]}"
    return str(one.verdict)


def published_text(one: Reproduction) -> str:
    """Tokens/s per GPU of the row, with a tilde where they follow from its TFLOPs or MFU."""
    tokens_per_s = one.published.tokens_per_s_per_gpu
    if tokens_per_s is None:
        return "-"
    is_own = one.published.basis in (Basis.PRINTED, Basis.STEP_TIME)
    return f"{'' if is_own else '~'}{rate_text(tokens_per_s)}"


def ratio_text(one: Reproduction) -> str:
    """Ours over published with its interval; a star where that comes from the steps of one run."""
    interval = one.interval
    if interval is None:
        return "-"
    mark = "*" if interval.basis == "steps" else ""
    digits = 2 if interval.high_ratio < 10 else 0
    estimate, low, high = (
        f"{ratio:.{digits}f}" for ratio in (interval.estimate_ratio, interval.low_ratio, interval.high_ratio)
    )
    return f"{estimate} ({low}-{high}){mark}"


def reproduce_json(found: Sequence[Reproduction]) -> dict[str, object]:
    """Everything, for scripts: counts, and every row with its differences in full."""
    return {
        "counts": {str(verdict): count for verdict, count in verdict_counts(found).items()},
        "rows": [
            {
                "recipe": one.published.recipe,
                "row": one.published.row_id,
                "trust": one.published.trust,
                "published_tokens_per_s_per_gpu": one.published.tokens_per_s_per_gpu,
                "published_basis": one.published.basis,
                "scale": one.scale,
                "num_runs": one.num_runs,
                "started_at": one.started_at,
                "tokens_per_s_per_gpu": one.tokens_per_s_per_gpu,
                "ratio": interval_json(one.interval),
                "verdict": str(one.verdict),
                "because": list(one.because),
                "projected_tokens_per_s_per_gpu": one.projected_tokens_per_s_per_gpu,
                "projected_over_published_ratio": one.projected_ratio,
            }
            for one in found
        ],
    }
