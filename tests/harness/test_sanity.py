"""The checks that end a run without a number: each with its exact words."""

from __future__ import annotations

import math

import pytest

from moe_bench.errors import MeasurementError
from moe_bench.harness import sanity
from moe_bench.harness.routing import ExpertLoad


def refusal(check: object, **arguments: object) -> str:
    with pytest.raises(MeasurementError) as caught:
        check(**arguments)  # type: ignore[operator]
    return str(caught.value)


def load(*tokens_per_step: tuple[int, ...]) -> ExpertLoad:
    return ExpertLoad(layer=3, is_mtp=False, tokens_per_step=tokens_per_step)


def test_a_loss_that_is_not_a_number_is_named_with_rank_and_step() -> None:
    words = refusal(sanity.require_finite, rank=1, step=2, loss=math.nan, grad_norm=1.0, was_applied=True)
    assert words == "rank 1: loss is nan in step 2"


def test_an_infinite_gradient_norm_is_named_even_where_the_loss_is_unknown() -> None:
    words = refusal(sanity.require_finite, rank=0, step=5, loss=None, grad_norm=math.inf, was_applied=True)
    assert words == "rank 0: gradient norm is inf in step 5"


def test_a_skipped_optimizer_step_gives_no_number() -> None:
    words = refusal(sanity.require_finite, rank=4, step=3, loss=6.2, grad_norm=1.0, was_applied=False)
    assert words == "rank 4: the optimizer skipped step 3: a gradient is not finite"


def test_a_sound_step_passes() -> None:
    sanity.require_finite(rank=0, step=1, loss=6.2, grad_norm=0.0, was_applied=True)


def test_another_gpu_than_the_recipes_is_refused() -> None:
    words = refusal(
        sanity.require_gpu, rank=7, expected="NVIDIA H100 80GB HBM3", found="NVIDIA A100-SXM4-80GB"
    )
    assert words.startswith("rank 7: the recipe is for 'NVIDIA H100 80GB HBM3', this GPU is 'NVIDIA A100")


def test_lost_token_copies_are_counted() -> None:
    words = refusal(sanity.require_no_drops, loads=[load((8, 8), (8, 5))], tokens_per_step=8, top_k=2)
    assert words == (
        "layer decoder.3: 3 of 16 token copies were dropped in step 2, and the recipe sets no capacity"
    )


def test_every_token_copy_at_some_expert_passes() -> None:
    sanity.require_no_drops([load((16, 0), (7, 9))], tokens_per_step=8, top_k=2)


def test_round_robin_that_is_not_even_is_refused() -> None:
    words = refusal(sanity.require_balance, loads=[load((8, 8, 8)), load((10, 7, 7))], num_micro_batches=2)
    assert words == (
        "layer decoder.3: round robin gave 7 to 10 tokens per expert in step 1; equal shares were asked for"
    )


def test_round_robin_may_differ_by_one_token_per_micro_batch() -> None:
    sanity.require_balance([load((9, 8, 7))], num_micro_batches=2)


def test_ranks_that_did_not_report_are_listed() -> None:
    words = refusal(sanity.require_all_ranks, ranks=[0, 2], world_size=4)
    assert words == "no samples from rank 1, 3 of 4"
