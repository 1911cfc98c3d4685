"""Put another value in the place of an attribute for as long as a block runs, and put the first one back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Substitution:
    """One attribute of a module or class, and what stands in for it."""

    owner: Any
    name: str
    replacement: Any


@contextlib.contextmanager
def substituted(substitution: Substitution) -> Iterator[None]:
    """Hold the substitution; an attribute that the owner merely inherits, or lacked, is removed again."""
    owner, name = substitution.owner, substitution.name
    was_own = name in vars(owner)
    original = vars(owner).get(name)
    setattr(owner, name, substitution.replacement)
    try:
        yield
    finally:
        if was_own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)
