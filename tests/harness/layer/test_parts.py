"""Parts of a layer: a moment is counted once, and every phase of Megatron-Core's layer is a part."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moe_bench.harness.layer.bench import Asked, Bench, bench_here, measure_layer
from moe_bench.harness.layer.megatron import engine_named
from moe_bench.harness.layer.parts import PartClock
from moe_bench.results.calibration import CPU, CalibrationProvenance
from moe_bench.results.layer_record import LayerRecord
from moe_bench.results.record import GitState, GpuFacts
from tests.harness.layer.peers.cases import host, small_case

EXCHANGED = {"router", "permute", "dispatch", "experts", "fc1", "fc2", "unpermute", "combine"}
PROVENANCE = CalibrationProvenance(
    started_at="2026-11-22T12:00:00+00:00",
    command=("moe-bench", "layer"),
    job_id="pid1",
    git=GitState(commit="0" * 40, branch="main", is_dirty=False),
    python_version="3.12",
    packages={},
    host="host",
    gpu=GpuFacts(name=CPU),
    cuda_version=None,
    environment={},
)


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron")


class Ticks:
    """A clock on which every mark is a second after the one before."""

    is_cold = False

    def __init__(self) -> None:
        self._now = 0

    def mark(self) -> int:
        self._now += 1
        return self._now

    def between_s(self, start: int, end: int) -> float:
        return float(end - start)

    def flush(self) -> None:
        """Nothing to empty."""


def test_a_moment_belongs_to_the_innermost_range_and_is_counted_once() -> None:
    parts = PartClock(Ticks())
    outer = parts.start("fc2 bwd")  # 1
    inner = parts.start("wgrad")  # 2
    parts.end(inner)  # 3
    other = parts.start("activation bwd")  # 4
    parts.end(other)  # 5
    parts.end(outer)  # 6
    late = parts.start("router bwd")  # 7, a second after the last one ended
    parts.end(late)  # 8
    assert parts.seconds() == ()
    parts.end_call()
    other = parts.start("router fwd")  # 9, of the next call, which has not ended
    (call,) = parts.seconds()
    assert call == {
        ("fc2", "backward"): 3.0,
        ("fc2", "wgrad"): 1.0,
        ("activation", "backward"): 1.0,
        ("router", "backward"): 1.0,
    }
    parts.end(other)  # 10
    parts.end_call()
    assert parts.seconds() == ({("router", "forward"): 1.0},)


def test_ranges_that_overlap_without_nesting_are_not_counted_twice() -> None:
    parts = PartClock(Ticks())
    first = parts.start("combine bwd")  # 1
    second = parts.start("shared experts bwd")  # 2
    parts.end(first)  # 3
    parts.end(second)  # 4
    parts.end_call()
    (call,) = parts.seconds()
    assert call == {("combine", "backward"): 1.0, ("shared experts", "backward"): 2.0}


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with bench_here(host(), is_tiny=True) as here:
        yield here


def record(bench: Bench, experts: str, **changes: int) -> LayerRecord:
    case = small_case("deepseek_v3", precision="bf16").model_copy(update=changes)
    return measure_layer(case, engine_named(experts, host()), bench, PROVENANCE, Asked())


def test_every_phase_of_the_layer_is_a_part_with_both_gradients_of_its_products(bench: Bench) -> None:
    found = record(bench, "torch_native", ep_size=2)
    passes = {(part.part, part.in_pass) for part in found.parts}
    assert {part for part, _ in passes} == EXCHANGED | {"activation", "shared experts"}
    for part in EXCHANGED | {"activation", "shared experts"}:
        assert {(part, "forward"), (part, "backward")} <= passes
    assert {(part, kind) for part in ("fc1", "fc2") for kind in ("dgrad", "wgrad")} <= passes
    assert found.unreachable == {}
    assert found.local_tokens_per_expert == (2 * 48 * 8 // 16,) * 8
    for place, total_s in enumerate(found.marked.total_s):
        assert sum(part.samples_s[place] for part in found.parts) <= total_s


def test_what_a_family_does_not_let_be_told_apart_is_named_and_not_zero(bench: Bench) -> None:
    found = record(bench, "sequential")
    passes = {(part.part, part.in_pass) for part in found.parts}
    assert ("fc1", "backward") in passes
    assert ("fc1", "dgrad") not in passes
    assert set(found.unreachable) == {"fc1 and fc2: dgrad, wgrad", "activation"}
