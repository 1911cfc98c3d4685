"""One MoE layer as a table: medians beside predictions and byte floors, and what follows from them."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from moe_bench.report.layer_plot import curves_ms, write_sweep_plot
from moe_bench.report.layer_view import (
    imbalance_ratio,
    layer_json,
    layer_view,
    part_lines,
    predicted_parts,
    suite_view,
    sweep_view,
)
from moe_bench.results.layer_record import LayerRecord, PartSamples
from moe_bench.results.layer_samples import WholeSamples
from moe_bench.results.sonicmoe import SHAPES
from moe_bench.spec.catalogue import recipes_root
from moe_bench.spec.layer_case import LayerRouting, sweep_of
from moe_bench.spec.load import Loader
from tests.results.test_layer_record import layer_record

SHAPE = SHAPES[0]
"""40,960 tokens x 768, 128 experts of width 256, top-8: forward 6 x 327,680 x 768 x 256 = 386.5 GFLOP."""
PARTS = {
    ("router", "forward"): 0.0002,
    ("router", "backward"): 0.0001,
    ("permute", "forward"): 0.0005,
    ("permute", "backward"): 0.0005,
    ("fc1", "forward"): 0.0010,
    ("fc1", "dgrad"): 0.0010,
    ("fc1", "wgrad"): 0.0010,
}


def record(**changes: Any) -> LayerRecord:
    parts = tuple(
        PartSamples.model_validate({"part": part, "in_pass": in_pass, "samples_s": (seconds,)})
        for (part, in_pass), seconds in PARTS.items()
    )
    content: dict[str, Any] = {
        "suite": "sonicmoe",
        "case": SHAPE.case(),
        "local_tokens_per_expert": (2560,) * 128,
        "whole": WholeSamples(forward_s=(0.002,), backward_s=(0.0024,)),
        "marked": WholeSamples(forward_s=(0.002,), backward_s=(0.0024,)),
        "parts": parts,
        "copy_bytes_per_s": 2.5e12,
        "dense_flops_per_s": 700e12,
    }
    return layer_record(**(content | changes))


def printed(view: RenderableType) -> str:
    console = Console(file=StringIO(), width=200)
    console.print(view, crop=False)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_a_captured_layer_is_shown_beside_the_one_that_is_launched() -> None:
    graphed = WholeSamples(forward_s=(0.0018,), backward_s=(0.00216,))
    shown = printed(layer_view(record(graphed=graphed), {}))
    assert "captured as CUDA graphs: 3.960 ms, 10.0% of the layer less" in shown
    assert "CUDA graphs" not in printed(layer_view(record(), {}))


def test_a_part_is_held_against_its_prediction_and_the_bytes_that_it_must_move() -> None:
    system = Loader(root=recipes_root()).system("h100_sxm")
    predicted = predicted_parts(record(), system)
    router, permute, fc1 = part_lines(record(), predicted)
    assert router.total_s == pytest.approx(0.0003)
    assert router.floor_s == pytest.approx(3 * 40960 * 768 * 2 / 2.5e12)
    assert permute.floor_s == pytest.approx(2 * (40960 + 8 * 40960) * 768 * 2 / 2.5e12)
    assert permute.predicted_s is None
    assert fc1.floor_s is None
    assert fc1.predicted_s == pytest.approx(
        sum(predicted["fc1", name] for name in ("forward", "dgrad", "wgrad"))
    )
    assert fc1.share_fraction == pytest.approx(0.003 / 0.0044)


def test_a_machine_without_a_gpu_has_no_prediction() -> None:
    assert predicted_parts(record(), Loader(root=recipes_root()).system("cpu_host")) == {}


def test_the_view_prints_rates_beside_the_published_ones_and_every_mark() -> None:
    text = printed(layer_view(record(), {}))
    # 386.5 GFLOP in 2 ms, twice that in 2.4 ms
    assert "forward 193.3 TFLOP/s, backward 322.1" in text
    assert "SonicMoE 341/370, Megatron 107/139" in text
    assert "residual +2.3%" not in text
    assert "router, permute and unpermute together: 29.5%" in text
    short = WholeSamples(forward_s=(0.004,), backward_s=(0.004,))
    assert "! residual +46.2%" in printed(layer_view(record(whole=short), {}))


def test_a_suite_has_a_line_for_each_layer() -> None:
    text = printed(suite_view([record(), record(case=SHAPES[1].case())]))
    assert text.count("megatron torch_native") == 2
    assert "402/402" in text


def test_json_has_what_the_view_computes(tmp_path: Path) -> None:
    data = layer_json(record(), {("fc1", "forward"): 0.001}, str(tmp_path))
    assert data["residual_fraction"] == pytest.approx(0.1 / 4.4)
    assert data["predicted"] == [{"part": "fc1", "in_pass": "forward", "seconds": 0.001}]
    assert data["peers"] is None


def sweep() -> list[LayerRecord]:
    balanced, steep = sweep_of(SHAPE.case())[:2]
    uneven = (5120,) + (2540,) * 126 + (2520,)
    return [record(case=balanced), record(case=steep, local_tokens_per_expert=uneven)]


def test_a_sweep_is_over_the_load_of_the_busiest_expert() -> None:
    records = sweep()
    assert [imbalance_ratio(one) for one in records] == [1.0, 2.0]
    text = printed(sweep_view(records))
    assert "power_law 0.25" in text
    assert curves_ms(records)["experts"] == pytest.approx([3.0, 3.0])
    assert curves_ms(records)["dispatch and combine"] == [0.0, 0.0]


def test_a_sweep_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "sweep.svg"
    write_sweep_plot(sweep(), path)
    assert "</svg>" in path.read_text(encoding="utf-8")


def test_the_label_of_a_routing_says_how_steep_it_is() -> None:
    assert LayerRouting(kind="power_law", exponent=0.8).label == "power_law 0.8"
    assert LayerRouting(kind="balanced").label == "balanced"
