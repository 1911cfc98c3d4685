"""What a user asks to be otherwise: keys of the recipe, as in `--set`, and constants of the projection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches

from moe_bench.errors import BadInputError
from moe_bench.projection.constants import Constants

PREFIX = "constants."
_NAMES = tuple(field.name for field in fields(Constants))


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """The other column of a comparison."""

    constants: Constants
    recipe_changes: tuple[str, ...]
    """`key=value` texts for the loader."""


def what_if(changes: Sequence[str], constants: Constants) -> WhatIf:
    """`changes` split into replaced constants and changes of the recipe.

    Raises BadInputError for a constant that does not exist or a value that it cannot have.
    """
    of_constants = [change for change in changes if change.startswith(PREFIX)]
    values = dict(_constant(change) for change in of_constants)
    return WhatIf(
        constants=constants.with_values(tuple(values), tuple(values.values())),
        recipe_changes=tuple(change for change in changes if change not in of_constants),
    )


def _constant(change: str) -> tuple[str, float]:
    key, _, text = change.partition("=")
    name = key.removeprefix(PREFIX)
    if name not in _NAMES:
        near = get_close_matches(name, _NAMES, n=1) or _NAMES
        raise BadInputError(
            f"--what-if {change}: no such constant; did you mean {PREFIX}{near[0]}? "
            "docs/projection.md lists them"
        )
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise BadInputError(f"--what-if {change}: {text!r} is no number above 0; write {PREFIX}{name}=NUMBER")
    return name, value
