"""The learning rate by its formula, and who has one of their own."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from megatron.core.optimizer.optimizer_config import ParamKey

from moe_bench.harness.training.learning_rate import expert_overrides, learning_rate_now, scheduler
from moe_bench.spec.training import LearningRate

pytestmark = pytest.mark.filterwarnings("ignore:Could not determine rank")

MAXIMUM = 0.01


def optimizer() -> SimpleNamespace:
    groups = [
        {"default_config": True, "max_lr": MAXIMUM, "min_lr": 0.1 * MAXIMUM},
        {"default_config": False, "max_lr": 0.5 * MAXIMUM, "min_lr": 0.05 * MAXIMUM},
    ]
    return SimpleNamespace(config=SimpleNamespace(lr=MAXIMUM, weight_decay=0.1), param_groups=groups)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, MAXIMUM / 4),
        (4, MAXIMUM),
        (8, 0.001 + 0.009 * (1 + math.cos(math.pi * 4 / 16)) / 2),
        (20, 0.001),
        (30, 0.001),
    ],
)
def test_it_warms_up_and_follows_half_a_cosine(step: int, expected: float) -> None:
    made = optimizer()
    rates = scheduler(made, LearningRate(num_warmup_steps=4, num_decay_steps=20))
    rates.step(step)
    assert learning_rate_now(made) == pytest.approx(expected)
    assert made.param_groups[1]["lr"] == pytest.approx(expected / 2)
    assert made.param_groups[0]["weight_decay"] == 0.1


def test_only_routed_experts_have_a_rate_of_their_own() -> None:
    overrides = expert_overrides(MAXIMUM, LearningRate(num_decay_steps=20, expert_factor=0.5))
    assert overrides is not None
    (key,) = [key for key, rates in overrides.items() if rates.get("max_lr") == 0.5 * MAXIMUM]
    assert isinstance(key, ParamKey)
    names = {
        "decoder.layers.1.mlp.experts.linear_fc1.weight": True,
        "decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight": True,
        "decoder.layers.1.mlp.shared_experts.linear_fc1.weight": False,
        "decoder.layers.1.mlp.router.weight": False,
    }
    assert {name: key.matches(SimpleNamespace(), name) for name in names} == names


def test_where_experts_learn_like_all_others_nothing_is_said_of_them() -> None:
    assert expert_overrides(MAXIMUM, LearningRate(num_decay_steps=20)) is None
