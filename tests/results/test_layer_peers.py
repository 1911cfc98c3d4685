"""Ratios of engines are taken round by round, and only between engines that were measured."""

import pytest
from pydantic import ValidationError

from moe_bench.results.layer_peers import (
    EngineResult,
    EngineTimes,
    LayerPeers,
    PeerRatio,
    TensorDifference,
)
from moe_bench.results.layer_samples import WholeSamples
from moe_bench.spec.layer_case import swiglu_case

CASE = swiglu_case("a", num_tokens=8, hidden_size=8, expert_ffn_hidden_size=8, num_experts=4, top_k=2)


def round_of(forward_s: float, backward_s: float) -> WholeSamples:
    return WholeSamples(forward_s=(forward_s,) * 3, backward_s=(backward_s,) * 3)


def measured(engine: str, *rounds: WholeSamples) -> EngineResult:
    times = EngineTimes(rounds=rounds, peak_bytes=None)
    return EngineResult(engine=engine, package="torch", version="2", outcome="measured", times=times)


def peers(*engines: EngineResult) -> LayerPeers:
    return LayerPeers(
        case=CASE, baseline="ours", num_checked_tokens=8, allowed_fraction=1e-5, engines=engines
    )


def test_a_drifting_clock_does_not_enter_a_ratio() -> None:
    # both become twice as slow in the second round
    ours = measured("ours", round_of(1.0, 2.0), round_of(2.0, 4.0))
    other = measured("other", round_of(3.0, 3.0), round_of(6.0, 6.0))
    both = peers(ours, other)
    assert both.ratio("other", "forward and backward") == PeerRatio(
        median_ratio=2.0, lowest_ratio=2.0, highest_ratio=2.0
    )
    assert both.ratio("other", "forward") == PeerRatio(median_ratio=3.0, lowest_ratio=3.0, highest_ratio=3.0)


def test_rounds_that_differ_show_in_the_range() -> None:
    ours = measured("ours", *(round_of(1.0, 1.0) for _ in range(3)))
    other = measured("other", round_of(1.0, 1.0), round_of(3.0, 3.0), round_of(2.0, 2.0))
    assert peers(ours, other).ratio("other", "forward and backward") == PeerRatio(
        median_ratio=2.0, lowest_ratio=1.0, highest_ratio=3.0
    )


def test_there_is_no_ratio_of_or_over_an_engine_that_was_not_measured() -> None:
    absent = EngineResult(
        engine="other", package="other", version=None, outcome="unable", reason="not installed"
    )
    assert peers(measured("ours", round_of(1.0, 1.0)), absent).ratio("other", "forward") is None
    assert peers(measured("mine", round_of(1.0, 1.0))).ratio("mine", "forward") is None


def test_a_tensor_that_is_not_finite_is_the_worst() -> None:
    differences = (
        TensorDifference(tensor="output", difference_fraction=1e3),
        TensorDifference(tensor="fc1", difference_fraction=None),
    )
    result = EngineResult(
        engine="other",
        package="other",
        version="1",
        outcome="disagrees",
        reason="far off",
        differences=differences,
    )
    assert result.worst == differences[1]


@pytest.mark.parametrize("outcome", ["unable", "disagrees", "failed"])
def test_times_of_an_engine_that_was_not_measured_are_refused(outcome: str) -> None:
    times = EngineTimes(rounds=(round_of(1.0, 1.0),), peak_bytes=None).model_dump()
    with pytest.raises(ValidationError, match="if and only if measured"):
        EngineResult.model_validate(
            {
                "engine": "a",
                "package": "a",
                "version": None,
                "outcome": outcome,
                "reason": "b",
                "times": times,
            }
        )


def test_an_engine_without_time_says_why() -> None:
    with pytest.raises(ValidationError, match="a reason must be given"):
        EngineResult(engine="a", package="a", version=None, outcome="unable")
