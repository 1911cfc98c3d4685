"""What is printed of a calibration: shapes in a few words, rates, and constants with where they come from."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console, RenderableType

from moe_bench.projection.evidence.calibrated_constants import constants_for
from moe_bench.report.calibration_view import calibration_json, calibration_view, shape_label
from moe_bench.results.calibration import Calibration, Task
from moe_bench.spec.catalogue import recipes_root
from moe_bench.spec.load import Loader
from tests.projection.evidence.test_calibrated_shapes import DENSE, WGRAD, calibration, measured

SYSTEM = Loader(root=recipes_root(), rules=()).system("h100_sxm")
ATTENTION = {
    "operation": "attention",
    "direction": "backward",
    "num_seqs": 2,
    "seq_len": 4096,
    "num_heads": 32,
    "num_query_groups": 4,
    "qk_head_dim": 192,
    "v_head_dim": 128,
    "window_tokens": 128,
}
HELD = {"operation": "sustained", "work": DENSE, "held_s": 30.0}


def printed(view: RenderableType) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(view)
    return capture.get()


def viewed(file: Calibration) -> str:
    return printed(calibration_view(file, constants_for(SYSTEM, [file], with_shapes=False)))


@pytest.mark.parametrize(
    ("what", "label"),
    [
        (DENSE, "4096 x 7168 x 4096"),
        (WGRAD, "wgrad 8 x 512 x 2048 x 1536 += fp32"),
        (WGRAD | {"tokens_per_expert": (1, 5)}, "wgrad 2 x 1..5 x 2048 x 1536 += fp32"),
        (ATTENTION, "backward 2 x 4096, 32:4 heads 192/128 window 128"),
        ({"operation": "launch", "num_kernels": 7, "layers_of": "a_model"}, "7 kernels of a_model layers"),
        (HELD, "dense_gemm held 30 s: 4096 x 7168 x 4096"),
        (HELD | {"held_s": 0.0}, "dense_gemm in bursts: 4096 x 7168 x 4096"),
    ],
)
def test_a_shape_is_said_in_a_few_words(what: dict[str, Any], label: str) -> None:
    assert (
        shape_label(Task.model_validate({"what": what, "dtype": "bf16", "implementation": "any"}).what)
        == label
    )


def test_rates_are_those_of_the_best_shape() -> None:
    num_flops = 2 * 4096 * 7168 * 4096
    text = viewed(calibration(measured(DENSE, num_flops / 700e12), measured(DENSE, num_flops / 600e12)))
    (row,) = [line for line in text.splitlines() if line.startswith("dense_gemm")]
    assert row.split()[-3:-1] == ["2", "700"]


def test_a_constant_is_printed_with_where_it_comes_from() -> None:
    burst, held = HELD | {"held_s": 0.0}, HELD
    text = viewed(calibration(measured(burst, 0.8), measured(held, 1.0)))
    assert "dense_gemm held 30 s: 4096 x 7168 x 4096: 0.800 of its rate in a burst" in text
    assert "constants.sustained_fraction = 0.8 (dense gemm held for 30 s over bursts)" in text


def test_what_says_nothing_about_a_gpu_is_marked() -> None:
    file = calibration(measured(DENSE, 1e-3)).model_copy(update={"is_tiny": True})
    assert "no projection reads this file" in viewed(file)
    assert "no projection reads this file" not in viewed(calibration(measured(DENSE, 1e-3)))
    assert calibration_json(file, "a path")["is_evidence"] is False
