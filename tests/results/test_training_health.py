"""Alarms begin when something begins, are not repeated while it lasts, and outlive a resumed run."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_bench.results.training_health import (
    Alarm,
    AlarmWatch,
    HealthLine,
    LayerHealth,
    append_health,
    cut_health,
    read_health,
)
from moe_bench.spec.training import Health

LIMITS = Health(every_steps=2, alarm_share_fraction=0.6, alarm_dead_steps=4)


def layer(*tokens: int, name: str = "decoder.0") -> LayerHealth:
    return LayerHealth(
        layer=name, top_k=2, num_tokens=10, tokens_per_expert=tokens, expert_bias_range=(-0.5, 0.25)
    )


def line(step: int, *tokens: int) -> HealthLine:
    return HealthLine(step=step, num_steps=2, layers=(layer(*tokens),))


def alarms(*lines: HealthLine, limits: Health = LIMITS) -> list[Alarm]:
    watch = AlarmWatch(limits)
    return [alarm for one in lines for alarm in watch.judged(one).alarms]


def test_a_layer_is_counted_by_hand() -> None:
    # ten tokens of two choices each; two of the twenty found no place
    found = layer(9, 9, 0)
    assert found.busiest_expert == 0
    assert found.busiest_share_fraction == 0.9
    assert found.dropped_fraction == pytest.approx(0.1)
    assert found.dead_experts == (2,)


def test_where_experts_choose_nothing_is_dropped() -> None:
    assert layer(6, 6, 6).model_copy(update={"experts_choose": True}).dropped_fraction is None


def test_an_expert_with_too_many_tokens_is_named_when_it_begins_and_when_it_comes_back() -> None:
    found = alarms(line(2, 7, 7, 6), line(4, 7, 6, 7), line(6, 6, 7, 7), line(8, 7, 7, 6))
    assert [(alarm.step, alarm.expert, alarm.value) for alarm in found] == [
        (2, 0, 0.7),
        (2, 1, 0.7),
        (4, 2, 0.7),
        (6, 1, 0.7),
        (8, 0, 0.7),
    ]
    assert found[0].text == "step 2: decoder.0: expert 0 takes 70.0% of the tokens (alarm above 60.0%)"


def test_an_expert_is_dead_after_so_many_steps_on_end_and_said_so_once() -> None:
    quiet = Health(every_steps=2, alarm_share_fraction=1.0, alarm_dead_steps=4)
    found = alarms(
        line(2, 10, 10, 0), line(4, 9, 9, 2), line(6, 10, 10, 0), line(8, 10, 10, 0), line(10, 10, 10, 0),
        limits=quiet,
    )  # fmt: skip
    assert [(alarm.step, alarm.expert, alarm.kind) for alarm in found] == [(8, 2, "dead")]
    assert found[0].text == "step 8: decoder.0: expert 2 got no token in 4 steps (alarm from 4)"


def test_without_a_share_the_limit_is_that_of_the_layer() -> None:
    limits = Health(every_steps=2, alarm_dead_steps=100)
    # sqrt(2 / 8) is half of the tokens
    (found,) = alarms(line(2, 6, 5, 5, 4, 0, 0, 0, 0), limits=limits)
    assert (found.expert, found.alarm_limit) == (0, 0.5)


def test_a_run_that_goes_on_remembers_how_long_an_expert_has_been_dead(tmp_path: Path) -> None:
    for one in (line(2, 6, 6, 0), line(4, 6, 6, 6), line(6, 6, 6, 0), line(8, 6, 6, 0)):
        append_health(tmp_path, one)
    cut_health(tmp_path, num_steps=6)
    kept = tuple(read_health(tmp_path))
    assert [one.step for one in kept] == [2, 4, 6]
    watch = AlarmWatch(LIMITS, kept)
    assert [alarm.kind for alarm in watch.judged(line(8, 6, 6, 0)).alarms] == ["dead"]


def test_a_run_without_experts_has_nothing_to_cut(tmp_path: Path) -> None:
    cut_health(tmp_path, num_steps=1)
    assert list(tmp_path.iterdir()) == []
