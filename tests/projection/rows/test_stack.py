"""Suite, engine and release, read off what a row prints."""

from __future__ import annotations

import pytest

from moe_bench.projection.rows.stack import Engine, Release, Suite, release_in, stack_of
from tests.projection.published_rows import made_row


@pytest.mark.parametrize(
    ("version", "release"),
    [
        ("NeMo 26.04.01 (v0.4.1, 2026-05)", Release(2026, 4, 1)),
        ("NeMo 25.09 (fa0315ae2, 2025-10)", Release(2025, 9)),
        ("v25.05.05", Release(2025, 5, 5)),
        ("nvcr.io/nvidia/nemo:26.08.rc4, verified 2026-08-04", Release(2026, 8)),
        ("nvcr.io/nvidia/pytorch:26.04-py3, verified 2026-07-20", Release(2026, 7)),
        ("README 9c5258f109 2026-08-11", Release(2026, 8)),
        ("dev bbc762d5 (2025)", Release(2025, 6)),
        ("", None),
    ],
)
def test_a_release_is_the_container_or_the_date(version: str, release: Release | None) -> None:
    assert release_in(version) == release


@pytest.mark.parametrize(
    ("framework", "suite", "engine"),
    [
        ("Megatron-Bridge", Suite.BRIDGE, Engine.MEGATRON),
        ("NeMo / Megatron-Bridge", Suite.BRIDGE, Engine.MEGATRON),
        ("NeMo 24.09", Suite.NEMO, Engine.MEGATRON),
        ("NeMo Automodel", Suite.AUTOMODEL, Engine.AUTOMODEL),
        ("torchtitan", Suite.TORCHTITAN, Engine.TORCHTITAN),
        ("Megatron-LM (ModelZoo)", Suite.MODEL_ZOO, Engine.MEGATRON),
        ("Megatron-Core (2025-04)", Suite.FOLDING, Engine.MEGATRON),
        ("Pai-Megatron-Patch", Suite.MEGATRON_LM, Engine.MEGATRON),
        ("Skywork-Megatron", Suite.OTHER, Engine.OTHER),
        ("DeepSeek HAI-LLM", Suite.OTHER, Engine.OTHER),
    ],
)
def test_a_framework_is_a_suite_on_an_engine(framework: str, suite: Suite, engine: Engine) -> None:
    stack = stack_of(made_row(framework=framework))
    assert (stack.suite, stack.engine) == (suite, engine)


def test_releases_are_ordered_and_an_unknown_one_is_before_nothing() -> None:
    assert Release(2026, 2) < Release(2026, 2, 1) < Release(2026, 4)
    assert not stack_of(made_row(version=None)).is_before(2099, 1)
