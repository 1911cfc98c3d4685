"""What a user asks to be otherwise: keys of the recipe, as in `--set`, constants, or the schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches

from moe_bench.errors import BadInputError
from moe_bench.projection.constants import Constants
from moe_bench.projection.schedule.shape import ScheduleKind

PREFIX = "constants."
SCHEDULE = "schedule="
_NAMES = tuple(field.name for field in fields(Constants))


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """The other column of a comparison."""

    constants: Constants
    schedule: ScheduleKind | None
    """In the place of Megatron-Core's."""
    recipe_changes: tuple[str, ...]
    """`key=value` texts for the loader."""


def what_if(changes: Sequence[str], constants: Constants) -> WhatIf:
    """`changes` split into replaced constants, a schedule, and changes of the recipe.

    Raises BadInputError for a constant or a schedule that does not exist or a value that it cannot have.
    """
    of_constants = [change for change in changes if change.startswith(PREFIX)]
    schedules = [change for change in changes if change.startswith(SCHEDULE)]
    values = dict(_constant(change) for change in of_constants)
    return WhatIf(
        constants=constants.with_values(tuple(values), tuple(values.values())),
        schedule=_schedule(schedules[-1]) if schedules else None,
        recipe_changes=tuple(change for change in changes if change not in (*of_constants, *schedules)),
    )


def _schedule(change: str) -> ScheduleKind:
    text = change.removeprefix(SCHEDULE)
    try:
        return ScheduleKind(text)
    except ValueError:
        known = ", ".join(kind.value for kind in ScheduleKind if kind is not ScheduleKind.NO_PIPELINE)
        raise BadInputError(f"--what-if {change}: no such schedule; write one of {known}") from None


def _constant(change: str) -> tuple[str, float]:
    key, _, text = change.partition("=")
    name = key.removeprefix(PREFIX)
    if name not in _NAMES:
        near = get_close_matches(name, _NAMES, n=1) or _NAMES
        raise BadInputError(
            f"--what-if {change}: no such constant; did you mean {PREFIX}{near[0]}? "
            f"They are {', '.join(_NAMES)}"
        )
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise BadInputError(f"--what-if {change}: {text!r} is no number above 0; write {PREFIX}{name}=NUMBER")
    return name, value
