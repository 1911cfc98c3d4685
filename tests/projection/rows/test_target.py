"""Which of a row's figures a projection is held against."""

from __future__ import annotations

import pytest

from moe_bench.projection.rows.inference import infer
from moe_bench.projection.rows.target import TargetBasis
from tests.projection.published_rows import CATALOGUE, inferred, made_row

GFLOP_PER_TOKEN = 23.04
"""Qwen3-30B-A3B at 4,096 tokens in Megatron-Core's count (docs/registry.md: 23.0)."""
ROUNDED = "tokens/s looks rounded (multiples of 16/32)"


def target(**columns: object) -> tuple[float, TargetBasis]:
    found = inferred(**columns).target
    return found.tokens_per_s_per_gpu, found.basis


def test_printed_tokens_come_first() -> None:
    assert target(metrics={"tokens_per_s_per_gpu": 9000.0, "tflops_per_gpu": 230}) == (9000, "tokens")


def test_rounded_tokens_give_way_to_tflops_that_agree() -> None:
    found, basis = target(
        metrics={"tokens_per_s_per_gpu": 8960.0, "tflops_per_gpu": 206},
        flops_convention="mcore",
        note=ROUNDED,
    )
    assert basis == "tflops"
    assert found == pytest.approx(206e3 / GFLOP_PER_TOKEN, rel=2e-3)


def test_tflops_that_disagree_do_not_replace_tokens() -> None:
    metrics = {"tokens_per_s_per_gpu": 8960.0, "tflops_per_gpu": 250}
    assert target(metrics=metrics, flops_convention="mcore", note=ROUNDED) == (8960, "tokens")


def test_a_mistaken_count_does_not_replace_tokens() -> None:
    metrics = {"tokens_per_s_per_gpu": 8960.0, "tflops_per_gpu": 206}
    found = target(metrics=metrics, flops_convention="mcore-bridge-gptoss-old", note=ROUNDED)
    assert found == (8960, "tokens")


def test_tflops_alone_are_divided_by_their_own_count() -> None:
    found, basis = target(metrics={"tflops_per_gpu": 206}, flops_convention="mcore")
    assert basis == "tflops"
    assert found == pytest.approx(206e3 / GFLOP_PER_TOKEN, rel=2e-3)


def test_a_step_time_gives_tokens() -> None:
    assert target(metrics={"step_time_s": 32.0}) == (1024 * 4096 / 16 / 32, "step")


def test_of_two_figures_that_contradict_each_other_the_one_with_the_tflops_counts() -> None:
    # 1024 x 4096 tokens over 16 GPUs in 29.1 s are 9,008 tokens/s, and 207.5 TFLOPs
    metrics = {"tokens_per_s_per_gpu": 4504.0, "step_time_s": 29.1, "tflops_per_gpu": 207.5}
    found, basis = target(metrics=metrics, flops_convention="mcore")
    assert basis == "step"
    assert found == pytest.approx(9008, rel=1e-3)


def test_an_mfu_is_a_share_of_the_peak() -> None:
    found, basis = target(metrics={"mfu_pct": 20.0}, flops_convention="mcore")
    assert basis == "mfu"
    assert found == pytest.approx(0.2 * 989.4e3 / GFLOP_PER_TOKEN, rel=2e-3)


def test_a_row_that_states_nothing_has_no_target() -> None:
    assert getattr(infer(made_row(metrics={}), CATALOGUE), "reason", None) == "no throughput"
