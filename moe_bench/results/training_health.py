"""How the experts of a training run fare: tokens of each, by layer, and what is alarming about them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from moe_bench.analysis.expert_health import (
    default_alarm_share_fraction,
    dropped_fraction,
    load_entropy_fraction,
)
from moe_bench.results.step_lines import StepLine, append_step, cut_steps, read_steps
from moe_bench.spec.base import NonNegativeInt, PositiveInt, Spec, Text
from moe_bench.spec.training import Health

HEALTH = "health.jsonl"
_WHAT = "a log of expert health"


class LayerHealth(Spec):
    """One layer with experts, over some steps and the whole global batch of each."""

    layer: Text
    """`decoder.<n>` or `mtp.<n>`, counted from 0."""
    top_k: PositiveInt
    num_tokens: PositiveInt
    """That passed the layer."""
    tokens_per_expert: tuple[NonNegativeInt, ...] = Field(min_length=1)
    """Token copies that each expert got, without those dropped and without what fills up a capacity."""
    experts_choose: bool = False
    """Whether experts choose tokens: then nothing is dropped, for no token chose."""
    expert_bias_range: tuple[float, float] | None
    """Smallest and largest bias on the choosing scores after the last of the steps; None without such."""

    @property
    def entropy_fraction(self) -> float | None:
        """Entropy of the load over that of an even one."""
        return load_entropy_fraction(self.tokens_per_expert)

    @property
    def busiest_expert(self) -> int:
        """The first of those with the most tokens."""
        return self.tokens_per_expert.index(max(self.tokens_per_expert))

    @property
    def busiest_share_fraction(self) -> float:
        """Of the layer's tokens, those that go to the busiest expert; balance is k / E."""
        return max(self.tokens_per_expert) / self.num_tokens

    @property
    def dropped_fraction(self) -> float | None:
        """Of the tokens' choices; None where experts choose."""
        if self.experts_choose:
            return None
        return dropped_fraction(
            num_choices=self.num_tokens * self.top_k, num_taken=sum(self.tokens_per_expert)
        )

    @property
    def dead_experts(self) -> tuple[int, ...]:
        """Those without a token."""
        return tuple(expert for expert, tokens in enumerate(self.tokens_per_expert) if not tokens)


class Alarm(Spec):
    """Something that begins to be wrong with an expert."""

    step: PositiveInt
    layer: Text
    expert: NonNegativeInt
    kind: Literal["share", "dead"]
    alarm_limit: float
    """Share of the tokens, or number of steps."""
    value: float

    @property
    def what(self) -> str:
        """What is wrong, beside the limit."""
        if self.kind == "share":
            return f"takes {self.value:.1%} of the tokens (alarm above {self.alarm_limit:.1%})"
        return f"got no token in {self.value:.0f} steps (alarm from {self.alarm_limit:.0f})"

    @property
    def text(self) -> str:
        """In one line."""
        return f"step {self.step}: {self.layer}: expert {self.expert} {self.what}"


class HealthLine(StepLine):
    """The experts over the steps since the line before."""

    num_steps: PositiveInt
    layers: tuple[LayerHealth, ...]
    alarms: tuple[Alarm, ...] = ()
    """Of what began in these steps."""


class AlarmWatch:
    """Looks at one line after another; an alarm is raised when something begins, and not while it lasts."""

    def __init__(self, limits: Health, earlier: Iterable[HealthLine] = ()) -> None:
        self._limits = limits
        self._dead_steps: dict[tuple[str, int], int] = {}
        self._too_busy: set[tuple[str, int]] = set()
        for line in earlier:
            self.judged(line)

    def judged(self, line: HealthLine) -> HealthLine:
        """`line` with its alarms."""
        found = [alarm for layer in line.layers for alarm in self._alarms(line, layer)]
        return line.model_copy(update={"alarms": tuple(found)})

    def _alarms(self, line: HealthLine, layer: LayerHealth) -> Iterator[Alarm]:
        most = self._limits.alarm_share_fraction or default_alarm_share_fraction(
            num_experts=len(layer.tokens_per_expert), top_k=layer.top_k
        )
        longest = self._limits.alarm_dead_steps
        for expert, tokens in enumerate(layer.tokens_per_expert):
            place = layer.layer, expert
            share = tokens / layer.num_tokens
            if share > most and place not in self._too_busy:
                yield Alarm(
                    step=line.step,
                    layer=layer.layer,
                    expert=expert,
                    kind="share",
                    alarm_limit=most,
                    value=share,
                )
            (self._too_busy.add if share > most else self._too_busy.discard)(place)
            before = self._dead_steps.get(place, 0)
            now = 0 if tokens else before + line.num_steps
            self._dead_steps[place] = now
            if before < longest <= now:
                yield Alarm(
                    step=line.step,
                    layer=layer.layer,
                    expert=expert,
                    kind="dead",
                    alarm_limit=longest,
                    value=now,
                )


def append_health(folder: Path, line: HealthLine) -> None:
    """Add `line` to the health file of the run in `folder`."""
    append_step(folder / HEALTH, line)


def read_health(folder: Path) -> Iterator[HealthLine]:
    """The lines of the run in `folder`; BadInputError names one that cannot be read."""
    yield from read_steps(folder / HEALTH, HealthLine, what=_WHAT)


def cut_health(folder: Path, *, num_steps: int) -> None:
    """Drop what was said after step `num_steps`, from which the run goes on."""
    if (folder / HEALTH).is_file():
        cut_steps(folder / HEALTH, HealthLine, num_steps=num_steps, what=_WHAT)
