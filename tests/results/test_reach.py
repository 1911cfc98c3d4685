"""What is to be reached on one H100, from records of known seconds."""

from __future__ import annotations

import pytest

from moe_bench.analysis.layer_bytes import permute_bytes, router_bytes, unpermute_bytes
from moe_bench.results.layer_peers import EngineResult, EngineTimes, LayerPeers
from moe_bench.results.layer_record import LayerRecord, PartSamples
from moe_bench.results.layer_samples import WholeSamples
from moe_bench.results.reach import (
    Reach,
    expert_gemm_fraction,
    reached,
    routing_floor_ratio,
    routing_fraction,
)
from moe_bench.results.record import GpuFacts
from moe_bench.results.sonicmoe import SHAPES
from moe_bench.spec.layer_case import swiglu_case
from tests.results.test_layer_record import layer_record

CASE = swiglu_case(
    "deepseek_v3/hand", num_tokens=500, hidden_size=64, expert_ffn_hidden_size=32, num_experts=64, top_k=2
)


def part(name: str, in_pass: str, seconds: float) -> PartSamples:
    return PartSamples.model_validate({"part": name, "in_pass": in_pass, "samples_s": (seconds,)})


def taken_apart(**changes: object) -> LayerRecord:
    """30 ms, of which 12 ms in products, 1.5 ms in the router and 1.5 ms in permutations."""
    parts = (
        part("router", "forward", 0.0005),
        part("router", "backward", 0.0010),
        part("permute", "forward", 0.0010),
        part("unpermute", "backward", 0.0005),
        part("fc1", "forward", 0.0030),
        part("fc1", "dgrad", 0.0030),
        part("fc2", "wgrad", 0.0060),
        part("activation", "forward", 0.0140),
    )
    return layer_record(case=CASE, parts=parts, **changes)


def figure(what: str, *records: LayerRecord) -> Reach:
    (found,) = [one for one in reached(records, ()) if one.what == what]
    return found


def test_the_rate_of_products_is_that_of_all_passes_over_a_dense_products() -> None:
    record = taken_apart(dense_flops_per_s=1e10)
    flops = 3 * 6 * 1000 * 64 * 32
    assert expert_gemm_fraction(record) == pytest.approx(flops / 0.012 / 1e10)
    assert expert_gemm_fraction(taken_apart()) is None


def test_routing_is_router_permute_and_unpermute_in_both_passes() -> None:
    record = taken_apart(copy_bytes_per_s=1e9)
    assert routing_fraction(record) == pytest.approx(0.003 / 0.030)
    moved = router_bytes(CASE) + sum(
        count(CASE, num_received_rows=1000) for count in (permute_bytes, unpermute_bytes)
    )
    assert routing_floor_ratio(record) == pytest.approx(0.003 / (moved / 1e9))
    share = figure("deepseek_v3: router and permutations", record)
    assert (share.measured, share.is_reached) == (pytest.approx(0.1), False)


def peers(**seconds: float) -> LayerPeers:
    """Every engine so long, forward and backward together."""
    engines = tuple(
        EngineResult(
            engine=name,
            package="torch",
            version="2",
            outcome="measured",
            times=EngineTimes(
                rounds=(WholeSamples(forward_s=(one / 2,), backward_s=(one / 2,)),), peak_bytes=None
            ),
        )
        for name, one in seconds.items()
    )
    return LayerPeers(
        case=CASE, baseline="torch_native", num_checked_tokens=8, allowed_fraction=0.1, engines=engines
    )


def test_of_several_grouped_engines_the_fastest_is_to_be_beaten() -> None:
    record = taken_apart(
        peers=peers(
            torch_native=0.010, hf_mixtral_grouped_mm=0.013, hf_qwen3_moe_grouped_mm=0.011, textbook=0.2
        )
    )
    grouped = figure("deepseek_v3: time of grouped_mm over ours", record)
    assert (grouped.measured, grouped.by) == (pytest.approx(1.1), "hf_qwen3_moe_grouped_mm")
    assert grouped.is_reached is False
    assert figure("deepseek_v3: time of textbook over ours", record).is_reached is True
    assert figure("deepseek_v3: time of sequential over ours", record).is_reached is None


def test_a_layer_of_the_suite_is_held_against_the_higher_rate_in_both_passes() -> None:
    shape = SHAPES[0]
    flops = 6 * shape.num_tokens * shape.top_k * shape.hidden_size * shape.expert_ffn_hidden_size
    rows = shape.num_tokens * shape.top_k // shape.num_experts
    record = layer_record(
        case=shape.case(),
        local_tokens_per_expert=(rows,) * shape.num_experts,
        whole=WholeSamples(
            forward_s=(flops / shape.sonicmoe.forward_flops_per_s,),
            backward_s=(2 * flops / shape.sonicmoe.backward_flops_per_s / 0.5,),
        ),
    )
    assert figure(f"{shape.name}: over the highest published rate", record).measured == pytest.approx(0.5)


def test_toys_and_other_gpus_say_nothing() -> None:
    other = layer_record().provenance.model_copy(update={"gpu": GpuFacts(name="NVIDIA H200")})
    for record in (taken_apart(is_tiny=True), taken_apart(provenance=other)):
        assert all(one.measured is None for one in reached([record], ()))


def test_nothing_measured_is_neither_reached_nor_missed() -> None:
    figures = reached((), ())
    assert {one.is_reached for one in figures} == {None}
    assert sum(one.what.startswith("sonicmoe/") for one in figures) == 12
