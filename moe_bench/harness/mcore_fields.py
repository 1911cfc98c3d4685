"""The names of Megatron-Core's configuration fields, so that a recipe's `mcore:` block is checked without it.

`mcore_fields.json` is read off the supported release; a test compares it with the installed one.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Container
from importlib import resources

Plain = bool | int | float | str | None | tuple["Plain", ...]
Arguments = dict[str, Plain]
"""Keyword arguments as data that JSON can hold."""

SUPPORTED_MEGATRON_CORE = "0.19"


@functools.cache
def megatron_fields() -> dict[str, tuple[str, ...]]:
    """Every config field of the supported Megatron-Core by name, with the classes that have it."""
    text = resources.files("moe_bench.harness").joinpath("mcore_fields.json").read_text(encoding="utf-8")
    by_class: dict[str, list[str]] = json.loads(text)
    owners: dict[str, list[str]] = {}
    for owner, names in by_class.items():
        for name in names:
            owners.setdefault(name, []).append(owner)
    return {name: tuple(classes) for name, classes in owners.items()}


def complaint_about(name: str, *, covered: Container[str]) -> tuple[str, str] | None:
    """What is wrong with `name` under `mcore:` and what to write instead; None where it may stand."""
    fields = megatron_fields()
    if name not in fields:
        owners = sorted({owner for classes in fields.values() for owner in classes})
        near = difflib.get_close_matches(name, sorted(fields), n=3)
        return (
            f"Megatron-Core {SUPPORTED_MEGATRON_CORE} has no such field",
            f"did you mean {' or '.join(near)}?" if near else f"write a field of {' or '.join(owners)}",
        )
    if name in covered:
        return "the recipe schema already covers this", "set the recipe's own key"
    return None
