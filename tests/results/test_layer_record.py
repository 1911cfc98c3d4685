"""The record of one MoE layer: what it computes on read, and that it is written once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_bench.results.calibration import CalibrationProvenance
from moe_bench.results.layer_record import (
    HeldSamples,
    LayerRecord,
    PartSamples,
    layer_records,
    read_layer_record,
    write_layer_record,
)
from moe_bench.results.layer_samples import WholeSamples
from moe_bench.results.record import GitState, GpuFacts
from moe_bench.results.store import record_files
from moe_bench.spec.layer_case import swiglu_case


def layer_record(**changes: Any) -> LayerRecord:
    """10 ms forward and 20 ms backward of 1,000 rows, of which the parts explain 29.5 ms."""
    content: dict[str, Any] = {
        "schema_version": 1,
        "provenance": CalibrationProvenance(
            started_at="2026-11-22T12:00:00+00:00",
            command=("moe-bench", "layer"),
            job_id="job7",
            git=GitState(commit="0" * 40, branch="main", is_dirty=False),
            python_version="3.12",
            packages={},
            host="node1",
            gpu=GpuFacts(name="NVIDIA H100 80GB HBM3"),
            cuda_version="12.8",
            environment={},
        ),
        "case": swiglu_case(
            "hand", num_tokens=500, hidden_size=64, expert_ffn_hidden_size=32, num_experts=4, top_k=2
        ),
        "engine": "megatron torch_native",
        "implementation": "torch:grouped_mm",
        "local_tokens_per_expert": (250, 250, 250, 250),
        "whole": WholeSamples(forward_s=(0.010,) * 4, backward_s=(0.020,) * 4),
        "marked": WholeSamples(forward_s=(0.011,) * 4, backward_s=(0.022,) * 4),
        "parts": (
            PartSamples(part="fc1", in_pass="forward", samples_s=(0.009, 0.0095, 0.010)),
            PartSamples(part="fc1", in_pass="dgrad", samples_s=(0.020, 0.020, 0.020)),
        ),
    }
    return LayerRecord(**(content | changes))


def test_the_residual_is_what_the_parts_leave_of_the_whole() -> None:
    record = layer_record()
    assert record.parts_s == pytest.approx(0.0295)
    assert record.residual_fraction == pytest.approx(0.5 / 30)
    assert record.marking_fraction == pytest.approx(0.1)
    assert record.marks == ()


def test_parts_are_added_up_call_by_call() -> None:
    # every call takes 30 ms, 15 ms more of it in another part each time
    parts = tuple(
        PartSamples(part=name, in_pass="forward", samples_s=samples)
        for name, samples in (
            ("fc1", (0.020, 0.005, 0.005)),
            ("fc2", (0.005, 0.020, 0.005)),
            ("router", (0.005, 0.005, 0.020)),
        )
    )
    assert layer_record(parts=parts).parts_s == pytest.approx(0.030)


@pytest.mark.parametrize("dgrad_s", [0.0190, 0.0220])
def test_a_residual_beyond_three_percent_marks_the_record_either_way(dgrad_s: float) -> None:
    parts = (
        PartSamples(part="fc1", in_pass="forward", samples_s=(0.0095,)),
        PartSamples(part="fc1", in_pass="dgrad", samples_s=(dgrad_s,)),
    )
    (mark,) = layer_record(parts=parts).marks
    assert mark.startswith("residual")


def test_a_spread_beyond_one_percent_and_a_toy_are_marked() -> None:
    shaky = WholeSamples(forward_s=(0.010, 0.010, 0.0106, 0.0106), backward_s=(0.020,) * 4)
    assert any(mark.startswith("spread") for mark in layer_record(whole=shaky).marks)
    assert any(mark.startswith("toy") for mark in layer_record(is_tiny=True).marks)


def test_rates_count_six_and_twelve_operations_per_row_and_weight() -> None:
    record = layer_record()
    assert record.forward_flops == 6 * 1000 * 64 * 32
    assert record.forward_flops_per_s == pytest.approx(6 * 1000 * 64 * 32 / 0.010)
    assert record.backward_flops_per_s == pytest.approx(12 * 1000 * 64 * 32 / 0.020)


def test_a_graph_saves_what_its_replay_does_not_take() -> None:
    assert layer_record().launch_fraction is None
    graphed = WholeSamples(forward_s=(0.008,) * 4, backward_s=(0.019,) * 4)
    assert layer_record(graphed=graphed).launch_fraction == pytest.approx(0.1)


def test_holding_is_judged_by_its_second_half() -> None:
    held = HeldSamples(held_for_s=60.0, burst_s=(0.010, 0.010), held_s=(0.010, 0.010, 0.013, 0.013))
    assert held.slowdown_fraction == pytest.approx(0.3)


def test_a_second_record_of_the_same_name_gets_a_number_and_none_is_taken_for_a_run(tmp_path: Path) -> None:
    record = layer_record()
    paths = [write_layer_record(tmp_path, record) for _ in range(3)]
    assert [path.name for path in paths] == [
        "20261122T120000Z-00000000-job7.json",
        "20261122T120000Z-00000000-job7-2.json",
        "20261122T120000Z-00000000-job7-3.json",
    ]
    assert paths[0].parent == tmp_path / "layer" / "nvidia_h100_80gb_hbm3"
    assert read_layer_record(paths[2]) == record
    assert list(record_files(str(tmp_path))) == []
    assert layer_records(tmp_path) == (record,) * 3
    assert layer_records(tmp_path / "nowhere") == ()
