"""What is held as named tensors come and go, by hand."""

import pytest

from moe_bench.analysis.live_tensors import Held, Instant, LiveTensors, Made, fullest


def test_the_peak_knows_the_passes_that_took_its_memory_and_where_it_was() -> None:
    live = LiveTensors()
    live.place = "attention"
    live.make("kept", 10)
    live.made, live.place = Made.RECOMPUTE, "experts"
    live.make("again", 5)
    live.made = Made.BACKWARD
    live.make("gradient", 3)
    live.free("again")
    live.make("small", 2)
    assert live.peak == Instant(Held(10, 5, 3), "experts")
    assert live.num_bytes == 15
    assert live.sizes == {"kept": 10, "gradient": 3, "small": 2}


def test_a_tensor_made_from_another_stands_beside_it_for_a_moment() -> None:
    live = LiveTensors()
    live.make("rows", 7)
    live.replace("rows", "sorted", 4)
    assert live.peak.total_bytes == 11
    assert live.sizes == {"sorted": 4}


def test_what_passes_by_is_in_the_peak_and_not_held() -> None:
    live = LiveTensors()
    live.make("kept", 1)
    live.pass_by(8)
    live.pass_by(3)
    assert (live.peak.total_bytes, live.num_bytes) == (9, 1)


def test_a_new_peak_starts_from_what_is_held() -> None:
    live = LiveTensors()
    live.make("large", 9)
    live.free("large")
    live.make("small", 2)
    live.start_peak()
    assert live.peak.total_bytes == 2


def test_a_name_is_alive_once_and_freed_once() -> None:
    live = LiveTensors()
    live.make("rows", 1)
    with pytest.raises(ValueError, match="rows is alive already"):
        live.make("rows", 1)
    live.rename("rows", "others")
    live.free_if_held("rows", "others")
    with pytest.raises(KeyError, match="others"):
        live.free("others")


def test_the_fullest_of_equal_instants_is_the_last() -> None:
    first, second = Instant(Held(1, 0, 0), "first"), Instant(Held(0, 0, 1), "second")
    assert fullest(first, second) == second
    assert fullest(first.plus(1), second).place == "first"
