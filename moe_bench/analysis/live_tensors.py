"""Named tensors that come and go while a part of the model runs, and the most that they hold at once."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple


class Made(IntEnum):
    """The kind of pass in which memory was taken: the categories of a dry run that move."""

    FORWARD = 0
    RECOMPUTE = 1
    BACKWARD = 2


class Held(NamedTuple):
    """Bytes held at one instant, by the pass that took them."""

    activations_bytes: int
    recomputed_bytes: int
    backward_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of them."""
        return self[0] + self[1] + self[2]

    def plus(self, activations_bytes: int) -> Held:
        """The same beside more activations."""
        return Held(self[0] + activations_bytes, self[1], self[2])

    def beside(self, other: Held) -> Held:
        """Both together."""
        return Held(self[0] + other[0], self[1] + other[1], self[2] + other[2])

    def times(self, number: int) -> Held:
        """That many of it."""
        return Held(self[0] * number, self[1] * number, self[2] * number)


NOTHING = Held(0, 0, 0)


class Instant(NamedTuple):
    """A moment of a pass that may be the fullest, and the part of the model that runs."""

    held: Held
    place: str

    @property
    def total_bytes(self) -> int:
        """Bytes held."""
        return self.held.total_bytes

    def plus(self, activations_bytes: int) -> Instant:
        """The same moment beside more activations."""
        return Instant(self.held.plus(activations_bytes), self.place)

    def beside(self, other: Held) -> Instant:
        """The same moment beside something else."""
        return Instant(self.held.beside(other), self.place)


def fullest(*instants: Instant) -> Instant:
    """The one with the most bytes; the last of several."""
    found = instants[0]
    for instant in instants[1:]:
        if instant.total_bytes >= found.total_bytes:
            found = instant
    return found


class LiveTensors:
    """What is alive; `made` and `place` say in which pass and part of the model the next tensors are made."""

    __slots__ = ("_held", "_peak", "_peak_held", "_peak_place", "_tensors", "_total", "made", "place")

    def __init__(self, made: Made = Made.FORWARD) -> None:
        self.made = made
        self.place = ""
        self._tensors: dict[str, tuple[Made, int]] = {}
        self._held = [0, 0, 0]
        self._total = 0
        self._peak = -1
        self._peak_held = NOTHING
        self._peak_place = ""

    def make(self, name: str, num_bytes: int) -> None:
        """A tensor is allocated. Raises ValueError for a name that is alive."""
        if name in self._tensors:
            raise ValueError(f"{name} is alive already")
        self._tensors[name] = (self.made, num_bytes)
        self._held[self.made] += num_bytes
        self._total += num_bytes
        if self._total > self._peak:
            self._mark()

    def free(self, *names: str) -> None:
        """Tensors are let go. Raises KeyError for a name that is not alive."""
        for name in names:
            made, num_bytes = self._tensors.pop(name)
            self._held[made] -= num_bytes
            self._total -= num_bytes

    def free_if_held(self, *names: str) -> None:
        """Tensors are let go, those of them that are alive."""
        self.free(*(name for name in names if name in self._tensors))

    def replace(self, old: str, new: str, num_bytes: int) -> None:
        """A tensor is made from another, which is let go afterwards."""
        self.make(new, num_bytes)
        self.free(old)

    def replace_first(self, old: tuple[str, ...], new: str, num_bytes: int) -> None:
        """A tensor is made from the first of `old` that is alive. Raises StopIteration where none is."""
        self.replace(next(name for name in old if name in self._tensors), new, num_bytes)

    def rename(self, old: str, new: str) -> None:
        """A tensor goes by another name."""
        if new in self._tensors:
            raise ValueError(f"{new} is alive already")
        self._tensors[new] = self._tensors.pop(old)

    def pass_by(self, num_bytes: int) -> None:
        """Memory is taken and given back before anything else happens."""
        if self._total + num_bytes > self._peak:
            self._held[self.made] += num_bytes
            self._total += num_bytes
            self._mark()
            self._held[self.made] -= num_bytes
            self._total -= num_bytes

    def start_peak(self) -> None:
        """Look for the fullest instant from here on."""
        self._mark()

    def holds(self, name: str) -> bool:
        """Whether a tensor is alive."""
        return name in self._tensors

    @property
    def num_bytes(self) -> int:
        """What is held now."""
        return self._total

    @property
    def sizes(self) -> dict[str, int]:
        """What is held now, by name."""
        return {name: num_bytes for name, (_, num_bytes) in self._tensors.items()}

    @property
    def peak(self) -> Instant:
        """The fullest instant since `start_peak`."""
        return Instant(self._peak_held, self._peak_place)

    def _mark(self) -> None:
        self._peak = self._total
        self._peak_held = Held(*self._held)
        self._peak_place = self.place
