"""Recipes that break one legality rule each; read from legality_examples.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A shipped recipe, changed so that one rule refuses it, and changed back to a legal one."""

    rule: str
    recipe: str
    breaks: tuple[str, ...]
    says: str
    cure: tuple[str, ...]

    def broken(self) -> Recipe:
        return self._changed(self.breaks)

    def cured(self) -> Recipe:
        return self._changed((*self.breaks, *self.cure))

    def _changed(self, changes: tuple[str, ...]) -> Recipe:
        loader = Loader(root=recipes_root(), rules=())
        return loader.recipe(find_recipe(self.recipe, loader), changes=changes)

    def __str__(self) -> str:
        return f"{self.rule}-{self.breaks[0]}"


def examples() -> tuple[Example, ...]:
    rows = yaml.safe_load((Path(__file__).parent / "legality_examples.yaml").read_text())
    return tuple(
        Example(
            rule=row["rule"],
            recipe=row["recipe"],
            breaks=tuple(row["breaks"]),
            says=row["says"],
            cure=tuple(row["cure"]),
        )
        for row in rows
    )
