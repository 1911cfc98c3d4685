"""Two sets of runs side by side: like with like, the ratio of their throughputs, and what it proves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from moe_bench.analysis.equivalence import (
    BAND_FRACTION,
    Claim,
    RatioInterval,
    claim,
    ratio_between,
    runs_to_decide,
)
from moe_bench.errors import BadInputError
from moe_bench.report.columns import Columns
from moe_bench.report.figures import rate_text
from moe_bench.results.likeness import (
    RunSet,
    Unlike,
    UnlikeRunsError,
    differences,
    is_covered,
    require_known,
    run_sets,
)
from moe_bench.results.metrics import mean_tokens_per_s_per_gpu
from moe_bench.results.summary import Run

MAX_SOFTWARE_SHOWN = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One side of a comparison."""

    num_runs: int
    tokens_per_s_per_gpu: float
    """Mean of the runs' medians."""
    has_settled: bool | None
    """False if any run drifts, else None if any is too short to tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A ratio of two like sets of runs."""

    name: str
    under_test: tuple[Unlike, ...]
    """The facts that `--vary` allowed to differ, and do."""
    software: tuple[Unlike, ...]
    """Versions in which the sides differ; a difference in speed may come from any of them."""
    base: Side
    new: Side
    interval: RatioInterval | None
    claim: Claim
    num_runs_to_decide: int | None
    """On each side; None where a claim is made, or where more runs would not help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Every pair that could be made, and the sets for which there was no partner."""

    comparisons: tuple[Comparison, ...]
    only_base: tuple[str, ...]
    only_new: tuple[str, ...]


def compare(
    base: Iterable[Run],
    new: Iterable[Run],
    *,
    vary: Sequence[str] = (),
    band_fraction: float = BAND_FRACTION,
) -> Compared:
    """Pair the sets of `base` and `new` that are alike but for `vary`, and compare each pair.

    Raises UnlikeRunsError where none are alike, BadInputError where a side is empty or holds two sets that
    would both be the partner.
    """
    base_sets, new_sets = _required("BASE", base), _required("NEW", new)
    require_known(vary, base_sets[0].facts)
    partners = _by_signature("BASE", base_sets, vary)
    pairs = [(partners.get(_signature(one, vary)), one) for one in new_sets]
    found = tuple(
        _comparison(old, one, vary=vary, band_fraction=band_fraction) for old, one in pairs if old is not None
    )
    if not found:
        unlike = differences(base_sets[0].facts, new_sets[0].facts)
        not_asked = tuple(one for one in unlike if not is_covered(one.fact, vary))
        raise UnlikeRunsError(f"BASE {base_sets[0].full_name}", f"NEW {new_sets[0].full_name}", not_asked)
    paired = {id(old) for old, _ in pairs}
    return Compared(
        comparisons=found,
        only_base=tuple(one.full_name for one in base_sets if id(one) not in paired),
        only_new=tuple(one.full_name for old, one in pairs if old is None),
    )


def compare_within(
    runs: Iterable[Run], *, vary: Sequence[str], band_fraction: float = BAND_FRACTION
) -> Compared:
    """Compare the sets of one folder that differ in `vary` alone; the first that was started is the base.

    Raises BadInputError where nothing is varied, or nothing differs in it.
    """
    if not vary:
        raise BadInputError("one folder is compared with itself: name what differs in it with --vary FIELD")
    sets = _required("BASE", runs)
    require_known(vary, sets[0].facts)
    alike: dict[frozenset[tuple[str, str]], list[RunSet]] = {}
    for one in sets:
        alike.setdefault(_signature(one, vary), []).append(one)
    found = tuple(
        _comparison(base, new, vary=vary, band_fraction=band_fraction)
        for base, *others in alike.values()
        for new in others
    )
    if not found:
        raise BadInputError(f"no two runs here differ in {', '.join(vary)} alone; compare two folders")
    alone = tuple(base.full_name for base, *others in alike.values() if not others)
    return Compared(comparisons=found, only_base=alone, only_new=())


def _required(side: str, runs: Iterable[Run]) -> tuple[RunSet, ...]:
    sets = run_sets(runs)
    if not sets:
        raise BadInputError(f"{side} holds no records; name record files or folders of them")
    return sets


def _signature(one: RunSet, vary: Sequence[str]) -> frozenset[tuple[str, str]]:
    return frozenset((fact, value) for fact, value in one.facts.items() if not is_covered(fact, vary))


def _by_signature(
    side: str, sets: Iterable[RunSet], vary: Sequence[str]
) -> dict[frozenset[tuple[str, str]], RunSet]:
    found: dict[frozenset[tuple[str, str]], RunSet] = {}
    for one in sets:
        rival = found.setdefault(_signature(one, vary), one)
        if rival is not one:
            unlike = (*differences(rival.facts, one.facts), *differences(rival.software, one.software))
            raise BadInputError(
                f"{side} holds two sets of {one.full_name} that differ in {unlike[0]}; name the files of one"
            )
    return found


def _comparison(old: RunSet, new: RunSet, *, vary: Sequence[str], band_fraction: float) -> Comparison:
    base_side, base_runs = _side(old)
    new_side, new_runs = _side(new)
    interval = ratio_between(base_runs, new_runs)
    drifts = base_side.has_settled is False or new_side.has_settled is False
    made = Claim.INCONCLUSIVE if drifts else claim(interval, band_fraction=band_fraction)
    needed = None
    if made is Claim.INCONCLUSIVE and not drifts:
        needed = runs_to_decide(interval, band_fraction=band_fraction)
    facts = differences(old.facts, new.facts)
    return Comparison(
        name=new.name,
        under_test=tuple(one for one in facts if is_covered(one.fact, vary)),
        software=differences(old.software, new.software),
        base=base_side,
        new=new_side,
        interval=interval,
        claim=made,
        num_runs_to_decide=needed,
    )


def _side(one: RunSet) -> tuple[Side, list[tuple[float, ...]]]:
    """What the table says of one side, and its steady steps in GPU-seconds per token."""
    runs = [run.gpu_s_per_token for run in one.runs]
    settled = [run.metrics.has_settled for run in one.runs]
    return (
        Side(
            num_runs=len(runs),
            tokens_per_s_per_gpu=mean_tokens_per_s_per_gpu(runs),
            has_settled=False if False in settled else None if None in settled else True,
        ),
        runs,
    )


def compared_view(compared: Compared) -> RenderableType:
    """One line per pair, the first line counting the claims."""
    counts = [f"{sum(pair.claim is made for pair in compared.comparisons)} {made}" for made in Claim]
    table = Columns(
        headings=("recipe", "base", "new", "new / base, 95 %", "claim", "over", "under test"),
        rows=tuple(
            (
                pair.name,
                rate_text(pair.base.tokens_per_s_per_gpu),
                rate_text(pair.new.tokens_per_s_per_gpu),
                ratio_text(pair.interval),
                claim_text(pair),
                _over_text(pair),
                _under_test_text(pair),
            )
            for pair in compared.comparisons
        ),
        right=frozenset(("base", "new")),
        is_stacked=True,
    )
    parts: list[RenderableType] = [
        Text(", ".join(counts), style="bold"),
        table,
        Text("tokens/s per GPU; inconclusive: runs a side that would decide", style="dim"),
    ]
    software = dict.fromkeys(str(one) for pair in compared.comparisons for one in pair.software)
    if software:
        shown = "; ".join(list(software)[:MAX_SOFTWARE_SHOWN])
        parts.append(Text(f"versions that differ: {shown}", style="dim"))
    for side, names in (("base", compared.only_base), ("new", compared.only_new)):
        if names:
            parts.append(Text(f"only in {side}: {', '.join(dict.fromkeys(names))}", style="yellow"))
    return Group(*parts)


def _under_test_text(pair: Comparison) -> str:
    """What was asked to differ, by the last word; kernels that differ for it are in the JSON."""
    asked = [one for one in pair.under_test if not one.fact.startswith("implementations.")]
    shown = [f"{one.fact.rpartition('.')[2]}: {one.base} -> {one.new}" for one in asked or pair.under_test]
    return ", ".join(shown) or "-"


def ratio_text(interval: RatioInterval | None) -> str:
    """`0.981 (0.976-0.987)`."""
    if interval is None:
        return "-"
    return f"{interval.estimate_ratio:.3f} ({interval.low_ratio:.3f}-{interval.high_ratio:.3f})"


def _over_text(pair: Comparison) -> str:
    """How many runs a side has, and whether the interval saw how they differ or only how their steps do."""
    runs = f"{pair.base.num_runs}+{pair.new.num_runs} runs"
    return f"steps of {runs}" if pair.interval is not None and pair.interval.basis == "steps" else runs


def claim_text(pair: Comparison) -> str:
    """The claim and, where none is made, why not or how many runs a side would decide."""
    if False in (pair.base.has_settled, pair.new.has_settled):
        return f"{pair.claim}: steps drift"
    if pair.num_runs_to_decide is None:
        return str(pair.claim)
    at_least = "" if pair.interval is not None and pair.interval.basis == "runs" else "≥"
    return f"{pair.claim}: {at_least}{pair.num_runs_to_decide} runs"


def compared_json(compared: Compared) -> dict[str, object]:
    """`compared_view` as JSON, with the facts and versions in which the sides of a pair differ."""
    return {
        "comparisons": [
            {
                "recipe": pair.name,
                "under_test": [_unlike_json(one) for one in pair.under_test],
                "software": [_unlike_json(one) for one in pair.software],
                "base": _side_json(pair.base),
                "new": _side_json(pair.new),
                "ratio": interval_json(pair.interval),
                "claim": str(pair.claim),
                "num_runs_to_decide": pair.num_runs_to_decide,
            }
            for pair in compared.comparisons
        ],
        "only_base": list(compared.only_base),
        "only_new": list(compared.only_new),
    }


def interval_json(interval: RatioInterval | None) -> dict[str, object] | None:
    """Estimate and ends of the interval of a ratio, and what it is over; None where there is none."""
    if interval is None:
        return None
    return {
        "estimate": interval.estimate_ratio,
        "low": interval.low_ratio,
        "high": interval.high_ratio,
        "over": interval.basis,
        "num_runs": interval.num_runs,
    }


def _side_json(side: Side) -> dict[str, object]:
    return {
        "num_runs": side.num_runs,
        "tokens_per_s_per_gpu": side.tokens_per_s_per_gpu,
        "has_settled": side.has_settled,
    }


def _unlike_json(one: Unlike) -> dict[str, str]:
    return {"fact": one.fact, "base": one.base, "new": one.new}
