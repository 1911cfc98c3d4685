"""What is wrong at one key of a recipe, before the loader knows which file and line that is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that the user must change, at the key where they would change it."""

    path: tuple[str | int, ...]
    problem: str
    fix: str
    rule: str = ""
    """Name of the legality rule in docs/check.md, where one is broken."""
