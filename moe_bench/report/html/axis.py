"""From values to places on a drawing: linear and logarithmic axes with ticks at round numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Place = Callable[[float], float]
"""Where a value stands along an axis, in pixels of the drawing."""

_ROUND_STEPS = (1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """One labelled place on an axis."""

    position_px: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """The ticks of one side of a chart and what they count."""

    title: str
    """With the unit, or with what is counted."""
    ticks: tuple[Tick, ...]


def linear(low: float, high: float, *, start_px: float, end_px: float) -> Place:
    """An axis on which equal differences are equal lengths; `low` stands at `start_px`."""
    per_value = (end_px - start_px) / (high - low)
    return lambda value: start_px + (value - low) * per_value


def logarithmic(low: float, high: float, *, start_px: float, end_px: float) -> Place:
    """An axis on which equal ratios are equal lengths; values are positive."""
    place = linear(math.log(low), math.log(high), start_px=start_px, end_px=end_px)
    return lambda value: place(math.log(value))


def round_range(low: float, high: float, *, num_steps: int = 4) -> tuple[float, ...]:
    """Round, equally spaced values whose first is at or below `low` and whose last is at or above `high`."""
    if high <= low:
        high = low + (abs(low) or 1.0) * 0.1
    step = _round_step((high - low) / num_steps)
    first, last = math.floor(low / step), math.ceil(round(high / step, 9))
    return tuple(index * step for index in range(first, last + 1))


def log_ticks(low: float, high: float, *, at_most: int = 7) -> tuple[float, ...]:
    """1, 2 and 5 times powers of ten around `low` to `high`, or 1 and 3 times where those are too many."""
    fine = _log_values(low, high, (1.0, 2.0, 5.0))
    return fine if len(fine) <= at_most else _log_values(low, high, (1.0, 3.0))


def _log_values(low: float, high: float, steps: tuple[float, ...]) -> tuple[float, ...]:
    """From the last value at or below `low` to the first at or above `high`, two at least."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1
    values = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    start = max(index for index, value in enumerate(values) if value <= low * (1 + 1e-9))
    end = min(index for index, value in enumerate(values) if value >= high * (1 - 1e-9))
    return tuple(values[start : max(end, start + 1) + 1])


def ticks(values: Sequence[float], place: Place) -> tuple[Tick, ...]:
    """A tick at every value, labelled with all its digits and as many decimals as the others; 0 is 0."""
    labels = [number(value) for value in values]
    num_decimals = max(len(label.partition(".")[2]) for label in labels)
    if num_decimals and not any("e" in label for label in labels):
        labels = [f"{value:,.{num_decimals}f}" if value else "0" for value in values]
    return tuple(
        Tick(position_px=place(value), label=label) for value, label in zip(values, labels, strict=True)
    )


def number(value: float) -> str:
    """A value on an axis: thousands separated, no trailing zeros."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{round(value, 9):g}"


def whole_ticks(first: int, last: int, *, at_most: int = 8) -> tuple[int, ...]:
    """Whole numbers from `first` to `last`, thinned to round steps."""
    step = max(1, round(_round_step((last - first) / at_most))) if last > first else 1
    start = -(-first // step) * step
    inside = list(range(start, last + 1, step))
    return tuple(sorted({first, *(value for value in inside if value - first >= step / 2)}))


def whole_axis(first: int, last: int, place: Place) -> tuple[Tick, ...]:
    """A tick at round whole numbers from `first` to `last`."""
    return tuple(Tick(position_px=place(value), label=number(value)) for value in whole_ticks(first, last))


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in _ROUND_STEPS if factor * power >= step * (1 - 1e-9))
