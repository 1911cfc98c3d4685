"""The typed view of the arguments that our own loop reads."""

from __future__ import annotations

import dataclasses

import pytest
from pydantic import ValidationError

from moe_bench.harness.mcore_config import megatron_arguments
from moe_bench.harness.settings import settings_of
from tests.harness.toys import smoke_recipe


def test_every_key_of_the_section_is_read() -> None:
    recipe = smoke_recipe("qwen3_30b_a3b")
    arguments = megatron_arguments(recipe)
    settings = settings_of(arguments)
    assert settings.model_dump() == arguments.training
    assert settings.tokens_per_step == recipe.tokens_per_step
    assert settings.num_steps == recipe.steps.num_warmup + recipe.steps.num_timed


def test_a_key_that_nobody_reads_is_an_error() -> None:
    arguments = megatron_arguments(smoke_recipe("qwen3_30b_a3b"))
    extended = dataclasses.replace(arguments, training=arguments.training | {"dropout": 0.1})
    with pytest.raises(ValidationError, match="dropout"):
        settings_of(extended)
