"""What a step does around Megatron-Core's schedule, in which order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moe_bench.harness import step
from moe_bench.harness.build import Training


class Recorder:
    """Any object of a training: the name of every method that is called on it, in order."""

    def __init__(self, said: list[str]) -> None:
        self._said = said
        self.config = SimpleNamespace(clip_grad=0.0)

    def __getattr__(self, name: str) -> Any:
        def call(*args: object) -> tuple[bool, None, None]:
            self._said.append(name)
            return True, None, None

        return call


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    monkeypatch.setattr(step, "_scheduled", lambda *args, **options: names.append("schedule"))
    monkeypatch.setattr(step, "_mean_loss", lambda losses: None)
    return names


def training(said: list[str], **changes: object) -> Training:
    made: Any = {"config": None, "chunks": (Recorder(said),), "optimizer": Recorder(said), **changes}
    return Training(**made)


def test_weights_that_share_memory_with_gradients_are_staged_once_these_are_zeroed(said: list[str]) -> None:
    step.train_step(training(said), [])
    assert said == [
        "zero_grad_buffer",
        "zero_grad",
        "prepare_model_params_for_param_sync",
        "schedule",
        "step",
    ]


def test_a_loss_is_of_the_weights_that_the_last_step_left(said: list[str]) -> None:
    step.loss_of(training(said), [])
    assert said == ["eval", "prepare_model_params_for_param_sync", "schedule", "train"]
    said.clear()
    step.loss_of(training(said, optimizer=None), [])
    assert said == ["eval", "schedule", "train"]
