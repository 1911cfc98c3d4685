"""Which rows of the registry a reader asks for: by model, system, precision, GPUs, trust and kind."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moe_bench.results.published import TRAINING_KINDS, PublishedRow, Trust, model_key
from moe_bench.results.row_recipe import PRECISIONS
from moe_bench.spec.load import UnknownNameError


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What is asked for; None asks for anything, but for `kind`, where it asks for training runs."""

    model: str | None = None
    """Printed name or folder under `recipes/`."""
    system: str | None = None
    """Printed hardware or file under `recipes/systems/`."""
    precision: str | None = None
    """As printed or as recipes name it; `fp8` asks for every FP8 that is so called."""
    num_gpus: int | None = None
    trust: Trust | None = None
    """The worst grade that is wanted: `B` gives A and B."""
    kind: str | None = None
    """`all` gives every kind."""


def selected(rows: Iterable[PublishedRow], asked: Selection) -> tuple[PublishedRow, ...]:
    """The rows that answer to `asked`, in their order.

    Raises UnknownNameError with the nearest names where no row has the model, system, precision or kind.
    """
    every = tuple(rows)
    precision = None if asked.precision is None else PRECISIONS.get(asked.precision, asked.precision)
    for what, name, key in (
        ("model", asked.model, _model),
        ("system", asked.system, _system),
        ("precision", precision, _precision),
        ("kind of row", None if asked.kind == "all" else asked.kind, _kind),
    ):
        if name is not None:
            known = sorted({key(row) for row in every} - {""})
            if _folded(what, name) not in known:
                raise UnknownNameError(f"published {what}", name, known)
            every = tuple(row for row in every if key(row) == _folded(what, name))
    if asked.kind is None:
        every = tuple(row for row in every if row.kind in TRAINING_KINDS)
    if asked.num_gpus is not None:
        every = tuple(row for row in every if row.num_gpus == asked.num_gpus)
    if asked.trust is not None:
        every = tuple(row for row in every if row.trust <= asked.trust)
    return every


def _folded(what: str, name: str) -> str:
    if what == "model":
        return model_key(name)
    return name.partition("_")[0].lower() if what == "system" else name.lower()


def _model(row: PublishedRow) -> str:
    return model_key(row.model)


def _system(row: PublishedRow) -> str:
    return (row.hardware or "").lower()


def _precision(row: PublishedRow) -> str:
    return (row.precision or "").lower()


def _kind(row: PublishedRow) -> str:
    return row.kind
