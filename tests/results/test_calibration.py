"""Rates of calibration files against hand counts, and what the loader refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moe_bench.errors import BadInputError
from moe_bench.results.calibration import Measurement, read_calibration

DENSE = {"operation": "dense_gemm", "num_rows": 4, "num_inner": 8, "num_columns": 16}
GROUPED = {
    "operation": "grouped_gemm",
    "direction": "wgrad",
    "tokens_per_expert": [3, 0, 5],
    "num_inputs": 8,
    "num_outputs": 4,
}
ATTENTION = {
    "operation": "attention",
    "direction": "forward",
    "num_seqs": 2,
    "seq_len": 4,
    "num_heads": 3,
    "num_query_groups": 1,
    "qk_head_dim": 6,
    "v_head_dim": 5,
}
COPY = {
    "operation": "copy",
    "variant": "device to device",
    "shape": [1024],
    "num_read_bytes": 2048,
    "num_written_bytes": 2048,
}


def measurement(what: Mapping[str, object], *samples_s: float) -> dict[str, Any]:
    return {
        "what": dict(what),
        "dtype": "bf16",
        "implementation": "made up for a test",
        "cold_l2": True,
        "samples_s": list(samples_s or (0.5,)),
    }


def measured(what: Mapping[str, object], *samples_s: float) -> Measurement:
    return Measurement.model_validate_json(json.dumps(measurement(what, *samples_s)))


def content(*measurements: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "provenance": {
            "started_at": "2026-11-22T07:00:00+00:00",
            "command": ["made", "up"],
            "job_id": "pid1",
            "git": {"commit": None, "branch": None, "is_dirty": None},
            "python_version": "3.12.1",
            "packages": {},
            "host": "node0",
            "gpu": {"name": "a GPU"},
            "cuda_version": None,
            "environment": {},
        },
        "measurements": list(measurements),
    }


def written(folder: Path, found: object) -> Path:
    path = folder / "one.json"
    path.write_text(json.dumps(found))
    return path


def test_a_dense_product_counts_two_operations_per_element_of_its_volume() -> None:
    found = measured(DENSE, 0.2, 0.9, 0.4)
    assert found.median_s == 0.4
    assert found.flops_per_s == pytest.approx(2 * 4 * 8 * 16 / 0.4)
    assert found.bytes_per_s == pytest.approx((4 * 8 + 8 * 16 + 4 * 16) * 2 / 0.4)


def test_a_grouped_product_counts_the_rows_of_all_experts() -> None:
    found = measured(GROUPED)
    assert found.flops_per_s == pytest.approx(2 * 8 * 8 * 4 / 0.5)
    assert found.bytes_per_s == pytest.approx((8 * (8 + 4) * 2 + 3 * 8 * 4 * 2) / 0.5)


def test_a_gradient_that_is_added_to_in_fp32_is_read_and_written() -> None:
    found = measured(GROUPED | {"accumulates_fp32": True})
    assert found.bytes_per_s == pytest.approx((8 * (8 + 4) * 2 + 3 * 8 * 4 * 8) / 0.5)


@pytest.mark.parametrize(("window", "num_pairs"), [(None, 10), (2, 7), (9, 10), (1, 4)])
def test_attention_counts_the_pairs_that_the_mask_leaves(window: int | None, num_pairs: int) -> None:
    found = measured(ATTENTION | {"window_tokens": window})
    seen = sum(max(0, query - (window or 4) + 1) <= key <= query for query in range(4) for key in range(4))
    assert seen == num_pairs
    assert found.flops_per_s == pytest.approx(2 * 3 * num_pairs * 2 * (6 + 5) / 0.5)


def test_attention_backward_is_five_products_to_two() -> None:
    square = ATTENTION | {"v_head_dim": 6}
    forward = measured(square).flops_per_s
    backward = measured(square | {"direction": "backward"}).flops_per_s
    assert forward is not None
    assert backward == pytest.approx(2.5 * forward)


def test_a_copy_has_a_rate_in_bytes_only() -> None:
    found = measured(COPY)
    assert found.bytes_per_s == pytest.approx(4096 / 0.5)
    assert found.flops_per_s is None


def test_a_launch_has_a_time_only() -> None:
    found = measured({"operation": "launch", "num_kernels": 100})
    assert (found.flops_per_s, found.bytes_per_s, found.median_s) == (None, None, 0.5)


def test_a_file_is_read_back_whole(tmp_path: Path) -> None:
    found = read_calibration(written(tmp_path, content(measurement(DENSE), measurement(COPY))))
    assert [one.what.operation for one in found.measurements] == ["dense_gemm", "copy"]
    assert found.provenance.gpu.name == "a GPU"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 3}, "schema_version: 3, 2 is read here"),
        ({"measurements": []}, "measurements: "),
        ({"measurements": [measurement(DENSE, 0.0)]}, r"measurements\.0\.samples_s\.0: "),
        ({"measurements": [measurement(DENSE | {"num_rows": 0})]}, r"0\.what\.dense_gemm\.num_rows: "),
        ({"measurements": [measurement({"operation": "sort"})]}, r"measurements\.0\.what: .*sort"),
        (
            {"measurements": [measurement(GROUPED | {"direction": "dgrad", "accumulates_fp32": True})]},
            "accumulates_fp32 in dgrad",
        ),
        ({"mean_s": 1.0}, "mean_s: Extra inputs"),
    ],
)
def test_a_mistake_is_named_by_file_and_field(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = written(tmp_path, content(measurement(DENSE)) | change)
    with pytest.raises(BadInputError, match=message) as caught:
        read_calibration(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("found", [[], {}, "text"])
def test_what_is_no_calibration_file_is_refused(tmp_path: Path, found: object) -> None:
    with pytest.raises(BadInputError, match="not a calibration file"):
        read_calibration(written(tmp_path, found))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="not a calibration file"):
        read_calibration(tmp_path / "none.json")
