"""Which runs may be divided by one another: equal in everything but the thing under test."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from moe_bench.errors import BadInputError
from moe_bench.results.facts import Facts
from moe_bench.results.summary import Run, RunSummary, summary_of

MAX_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Unlike:
    """One fact in which two runs differ."""

    fact: str
    base: str
    new: str

    def __str__(self) -> str:
        return f"{self.fact}: {self.base} against {self.new}"


class UnlikeRunsError(BadInputError):
    """A ratio of two runs that would mean nothing."""

    def __init__(self, base: str, new: str, differences: tuple[Unlike, ...]) -> None:
        shown = "; ".join(str(one) for one in differences[:MAX_SHOWN])
        more = f"; and {len(differences) - MAX_SHOWN} more" if len(differences) > MAX_SHOWN else ""
        super().__init__(
            f"{base} and {new} are unlike: {shown}{more}; compare like with like, or name the one thing "
            "under test with --vary FIELD"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSet:
    """Runs of one recipe, scale and machine by one version of the software: repeats of each other."""

    runs: tuple[RunSummary, ...]
    facts: Facts
    software: Facts
    """Commit, packages and drivers: not the same in two runs that a gate compares."""

    @property
    def name(self) -> str:
        """Recipe, scale, and the mark of a changed recipe."""
        return self._named("modified")

    @property
    def full_name(self) -> str:
        """The same with every change that the user made."""
        return self._named(*self.runs[0].plan.modified)

    def _named(self, *changes: str) -> str:
        plan = self.runs[0].plan
        marks = [f"{plan.scale} scale"] if plan.scale != "full" else []
        marks += changes if plan.modified else ()
        return plan.asked + (f" ({', '.join(marks)})" if marks else "")


def run_sets(runs: Iterable[Run]) -> tuple[RunSet, ...]:
    """Runs that are repeats of each other, put together; sets and repeats in the order of their start."""
    ordered = sorted(map(summary_of, runs), key=lambda run: run.started_at)
    # runs that come from one index share their facts, so by identity each is read through once
    each = {id(facts): facts for run in ordered for facts in (run.facts, run.software)}
    contents = {place: frozenset(facts.items()) for place, facts in each.items()}
    grouped: dict[tuple[frozenset[tuple[str, str]], ...], list[RunSummary]] = {}
    for run in ordered:
        key = contents[id(run.facts)], contents[id(run.software)]
        grouped.setdefault(key, []).append(run)
    return tuple(
        RunSet(runs=tuple(same), facts=same[0].facts, software=same[0].software) for same in grouped.values()
    )


def differences(base: Facts, new: Facts) -> tuple[Unlike, ...]:
    """Every fact in which the two differ; one that only one side has differs from `-`."""
    names = dict.fromkeys((*base, *new))
    return tuple(
        Unlike(fact=name, base=base.get(name, "-"), new=new.get(name, "-"))
        for name in names
        if base.get(name) != new.get(name)
    )


def is_covered(fact: str, vary: Iterable[str]) -> bool:
    """Whether `fact` is under test: `vary` holds its name, its last word, or a name that it stands below.

    So `dispatcher` covers `dispatch.dispatcher` and `implementations.dispatcher`, and `kernels` all kernels.
    """
    return any(fact == field or fact.startswith(f"{field}.") or fact.endswith(f".{field}") for field in vary)


def require_known(vary: Iterable[str], facts: Facts) -> None:
    """Raise BadInputError where a field under test is none that runs have, with the nearest ones."""
    for field in vary:
        if not any(is_covered(fact, (field,)) for fact in facts):
            near = difflib.get_close_matches(field, [*facts, *(fact.split(".")[-1] for fact in facts)], n=3)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see a record's `recipe`"
            raise BadInputError(f"--vary {field}: runs have no such field; {hint}")
