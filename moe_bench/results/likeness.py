"""Which runs may be divided by one another: equal in everything but the thing under test."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moe_bench.errors import BadInputError
from moe_bench.results.record import Record

Facts = Mapping[str, str]
"""What two runs must have in common, by dotted name; `dispatch.dispatcher` is a field of the recipe."""

_NAMES_ONLY = {"variant", "reproduces", "differences", "origin"}
"""Parts of a recipe that say what it is called and where it comes from, and change nothing that runs."""
_DESCRIPTIONS = {"display_name", "hf_id", "default_run", "published", "sources", "max_position_embeddings"}
"""The same for models and systems."""
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

    records: tuple[Record, ...]
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
        return self._named(*self.records[0].plan.modified)

    def _named(self, *changes: str) -> str:
        plan = self.records[0].plan
        marks = [f"{plan.scale} scale"] if plan.scale != "full" else []
        marks += changes if plan.modified else ()
        return plan.asked + (f" ({', '.join(marks)})" if marks else "")


def facts_of(record: Record) -> Facts:
    """Recipe as run, scale, GPUs and the kernels that ran.

    The way in which FLOPs are counted is not among them: it is the reader's, one for all records.
    """
    recipe = record.plan.recipe.model_dump(mode="json", exclude=_NAMES_ONLY)
    for part in ("model", "system"):
        recipe[part] = {key: value for key, value in recipe[part].items() if key not in _DESCRIPTIONS}
    facts = {"scale": str(record.plan.scale), "num_ranks": str(record.num_ranks), **_leaves(recipe)}
    facts |= _leaves(record.samples.implementations.model_dump(mode="json"), "implementations.")
    facts["patches"] = ", ".join(record.samples.patches) or "none"
    gpus = record.provenance.gpus
    if gpus:
        for field in ("name", "power_limit_w", "max_sm_clock_hz", "memory_bytes"):
            facts[f"gpu.{field}"] = " and ".join(sorted({str(getattr(gpu, field)) for gpu in gpus}))
    else:
        facts["cpu_model"] = str(record.provenance.cpu_model)
    return facts


def software_of(record: Record) -> Facts:
    """Commit, packages, drivers and libraries that a record was made with."""
    provenance = record.provenance
    drivers = sorted({str(gpu.driver_version) for gpu in provenance.gpus})
    return {
        "commit": f"{provenance.git.commit}{' dirty' if provenance.git.is_dirty else ''}",
        **{f"packages.{name}": version for name, version in provenance.packages.items()},
        "driver": " and ".join(drivers) or "none",
        "nccl": str(provenance.nccl_version),
        "cuda": str(provenance.cuda_version),
        "python": provenance.python_version,
        "container": str(provenance.container),
    }


def run_sets(records: Iterable[Record]) -> tuple[RunSet, ...]:
    """Records that are repeats of each other, put together; sets and repeats in the order of their start."""
    grouped: dict[tuple[tuple[str, str], ...], list[Record]] = {}
    for record in sorted(records, key=lambda record: record.provenance.started_at):
        key = (*sorted(facts_of(record).items()), *sorted(software_of(record).items()))
        grouped.setdefault(key, []).append(record)
    return tuple(
        RunSet(records=tuple(same), facts=facts_of(same[0]), software=software_of(same[0]))
        for same in grouped.values()
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


def _leaves(tree: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Every leaf by its dotted name, as text."""
    leaves: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            leaves[prefix + key] = ", ".join(map(str, value)) or "none"
        else:
            leaves[prefix + key] = "none" if value is None else str(value)
    return leaves
