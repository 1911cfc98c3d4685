"""The jobs of an experiment: every combination of the values under test, repeated, in interleaved order."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_bench.errors import BadInputError
from moe_bench.spec.fields import field_path
from moe_bench.spec.scale import Plan

_COMMA = re.compile(r",(?![^\[]*\])")
"""A comma between values, not one inside a list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One job of an experiment."""

    num_gpus: int | None = None
    """Size of the member of the scaling family; None for the recipe's own."""
    changes: tuple[str, ...]
    """`key=value`, as `--set` takes them."""
    repeat: int
    """From 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedJob:
    """One job that can start."""

    plan: Plan
    """As its record will hold it."""
    run_args: tuple[str, ...]
    """What follows `moe-bench run` in it."""
    repeat: int
    file: Path | None
    """Recipe file that must be there before it starts; None where the recipe has one already."""


def interleaved(vary: Sequence[str], *, num_repeats: int, sizes: Sequence[int] = ()) -> tuple[Variant, ...]:
    """The product of `sizes` in GPUs and of `vary` (`FIELD=VALUE,VALUE,...` each), `num_repeats` times.

    All combinations once, then all of them again: what drifts over the day, a warm machine or a busy fabric,
    falls on every combination alike. Raises BadInputError for a field that is none, and for a size or a value
    that is given twice.
    """
    axes = [_axis(one) for one in vary]
    fields = [axis[0].partition("=")[0] for axis in axes]
    if len(set(fields)) < len(fields):
        raise BadInputError(f"--vary: {', '.join(fields)}: a field may vary once; list its values together")
    if len(set(sizes)) < len(sizes):
        listed = ",".join(map(str, sizes))
        raise BadInputError(f"--num-gpus {listed}: a size is given twice; repeat runs with --repeats")
    return tuple(
        Variant(num_gpus=num_gpus, changes=changes, repeat=repeat)
        for repeat in range(num_repeats)
        for num_gpus in sizes or (None,)
        for changes in itertools.product(*axes)
    )


def _axis(text: str) -> tuple[str, ...]:
    name, equals, listed = text.partition("=")
    values = _COMMA.split(listed)
    if not equals or not name or not all(values):
        raise BadInputError(f"--vary {text}: expected FIELD=VALUE,VALUE, such as dispatcher=alltoall,deepep")
    if len(set(values)) < len(values):
        raise BadInputError(f"--vary {text}: a value is given twice; repeat runs with --repeats")
    return tuple(f"{field_path(name)}={value}" for value in values)
