"""Calibration files as evidence: a planted one wins over the law, a missing one is said to be missing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moe_bench.errors import BadInputError
from moe_bench.projection.efficiency import Efficiency, Unanswered
from moe_bench.projection.evidence.calibrated_shapes import read_calibrations
from moe_bench.projection.evidence.grade import Grade
from moe_bench.projection.work.operations import AttentionCore, Gemm, MemoryBound, Number, Part, Pass
from moe_bench.results.calibration import Calibration
from moe_bench.spec.catalogue import recipes_root
from moe_bench.spec.load import Loader

SYSTEM = Loader(root=recipes_root(), rules=()).system("h100_sxm")
H100 = "NVIDIA H100 80GB HBM3"
LAW = Efficiency(SYSTEM)
DENSE = {"operation": "dense_gemm", "num_rows": 4096, "num_inner": 7168, "num_columns": 4096}
PRODUCT = Gemm(part=Part.DENSE_MLP, in_pass=Pass.FORWARD, num_rows=4096, num_inner=7168, num_columns=4096)
WGRAD = {
    "operation": "grouped_gemm",
    "direction": "wgrad",
    "tokens_per_expert": (512,) * 8,
    "num_inputs": 2048,
    "num_outputs": 1536,
    "accumulates_fp32": True,
}
GROUPED_WGRAD = Gemm(
    part=Part.EXPERTS,
    in_pass=Pass.WGRAD,
    num_rows=1536,
    num_inner=512,
    num_columns=2048,
    num_groups=8,
    accumulates=True,
)


def measured(
    what: Mapping[str, object],
    time_s: float,
    *,
    implementation: str = "made up for a test",
    dtype: str = "bf16",
    cold_l2: bool = True,
) -> dict[str, Any]:
    return {
        "what": dict(what),
        "dtype": dtype,
        "implementation": implementation,
        "cold_l2": cold_l2,
        "samples_s": (time_s,),
    }


def calibration(*measurements: dict[str, Any], gpu: str = H100, **facts: float) -> Calibration:
    gpu_facts = {name: value for name, value in facts.items() if name != "end_sm_clock_hz"}
    return Calibration.model_validate(
        {
            "provenance": {
                "started_at": "2026-11-22T07:00:00+00:00",
                "command": ("made", "up"),
                "job_id": "pid1",
                "git": {"commit": None, "branch": None, "is_dirty": None},
                "python_version": "3.12.1",
                "packages": {},
                "host": "node0",
                "gpu": {"name": gpu, **gpu_facts},
                "end_sm_clock_hz": facts.get("end_sm_clock_hz"),
                "cuda_version": None,
                "environment": {},
            },
            "measurements": measurements,
        }
    )


def test_a_planted_measurement_wins_over_the_law() -> None:
    time_s = 1.25 * LAW.gemm(PRODUCT).burst_s
    efficiency = Efficiency(SYSTEM, [calibration(measured(DENSE, time_s))])
    cost = efficiency.gemm(PRODUCT)
    assert cost.burst_s == pytest.approx(time_s)
    assert cost.compute_s == pytest.approx(1.25 * LAW.gemm(PRODUCT).compute_s)
    assert cost.grade is Grade.MEASURED_HERE
    assert efficiency.unanswered == ()


def test_an_operation_far_from_every_measurement_is_answered_by_the_law_and_reported() -> None:
    efficiency = Efficiency(SYSTEM, [calibration(measured(DENSE, 1e-3))])
    far = Gemm(part=Part.ROUTER, in_pass=Pass.FORWARD, num_rows=4096, num_inner=7168, num_columns=256)
    assert efficiency.gemm(far) == LAW.gemm(far)
    assert efficiency.unanswered == (
        Unanswered("dense product, bf16", "measured here", "the nearest measured shape is 4.0 octaves away"),
    )


def test_an_operation_that_nobody_measured_is_answered_by_the_law_and_reported_once() -> None:
    efficiency = Efficiency(SYSTEM, [calibration(measured(DENSE, 1e-3))])
    norm = MemoryBound(part=Part.NORMS, in_pass=Pass.FORWARD, num_bytes=1e8)
    assert [efficiency.memory(norm) for _ in range(3)] == 3 * [LAW.memory(norm)]
    kind = "memory, norms and residuals"
    assert efficiency.unanswered == (
        Unanswered(kind, "measured here", f"no calibration has measured: {kind}"),
    )


def test_without_calibration_nothing_is_unanswered() -> None:
    LAW.gemm(PRODUCT)
    assert LAW.unanswered == ()


def test_the_fastest_implementation_counts_and_a_cold_cache_before_a_warm_one() -> None:
    files = calibration(
        measured(DENSE, 4e-4, implementation="one"),
        measured(DENSE, 3e-4, implementation="other"),
        measured(DENSE, 1e-4, cold_l2=False),
    )
    assert Efficiency(SYSTEM, [files]).gemm(PRODUCT).burst_s == pytest.approx(3e-4)


def test_a_grouped_gradient_is_found_in_the_projections_own_orientation() -> None:
    time_s = 2 * LAW.gemm(GROUPED_WGRAD).burst_s
    efficiency = Efficiency(SYSTEM, [calibration(measured(WGRAD, time_s))])
    assert efficiency.gemm(GROUPED_WGRAD).burst_s == pytest.approx(time_s)
    assert efficiency.gemm(GROUPED_WGRAD).grade is Grade.MEASURED_HERE


def test_the_passes_of_grouped_products_are_measured_apart() -> None:
    efficiency = Efficiency(SYSTEM, [calibration(measured(WGRAD, 1e-3))])
    forward = Gemm(
        part=Part.EXPERTS, in_pass=Pass.FORWARD, num_rows=512, num_inner=2048, num_columns=1536, num_groups=8
    )
    assert efficiency.gemm(forward) == LAW.gemm(forward)


def test_a_skewed_grouped_product_says_nothing_about_balanced_ones() -> None:
    skewed = WGRAD | {"tokens_per_expert": (4000, 0, 0, 0, 0, 0, 0, 96)}
    efficiency = Efficiency(SYSTEM, [calibration(measured(skewed, 1e-3))])
    assert efficiency.gemm(GROUPED_WGRAD) == LAW.gemm(GROUPED_WGRAD)


def test_eight_bits_and_sixteen_are_measured_apart() -> None:
    efficiency = Efficiency(SYSTEM, [calibration(measured(DENSE, 1e-3, dtype="fp8_e4m3"))])
    assert efficiency.gemm(PRODUCT) == LAW.gemm(PRODUCT)
    low = Gemm(
        part=Part.DENSE_MLP,
        in_pass=Pass.FORWARD,
        num_rows=4096,
        num_inner=7168,
        num_columns=4096,
        number=Number.FP8_TENSORWISE,
    )
    assert efficiency.gemm(low).burst_s == pytest.approx(1e-3)


@pytest.mark.parametrize(("direction", "in_pass"), [("forward", Pass.FORWARD), ("backward", Pass.DGRAD)])
def test_attention_is_found_by_direction(direction: str, in_pass: Pass) -> None:
    what = {
        "operation": "attention",
        "direction": direction,
        "num_seqs": 1,
        "seq_len": 4096,
        "num_heads": 32,
        "num_query_groups": 8,
        "qk_head_dim": 128,
        "v_head_dim": 128,
    }
    file = calibration(measured(what, 5e-4))
    core = AttentionCore(
        in_pass=in_pass,
        num_flops=file.measurements[0].what.num_flops,
        seq_len=4096,
        context=1,
        qk_head_dim=128,
        v_head_dim=128,
    )
    efficiency = Efficiency(SYSTEM, [file])
    assert efficiency.attention(core).burst_s == pytest.approx(5e-4)
    assert efficiency.attention(core).grade is Grade.MEASURED_HERE


def test_a_measured_permutation_costs_what_was_measured() -> None:
    what = {
        "operation": "permutation",
        "variant": "permute",
        "shape": (4096, 2048),
        "num_read_bytes": 50_000_000,
        "num_written_bytes": 50_000_000,
    }
    permutation = MemoryBound(part=Part.PERMUTATION, in_pass=Pass.FORWARD, num_bytes=1e8)
    efficiency = Efficiency(SYSTEM, [calibration(measured(what, 9e-5))])
    assert efficiency.memory(permutation).burst_s == pytest.approx(9e-5)


def test_calibration_of_another_gpu_is_refused() -> None:
    with pytest.raises(BadInputError, match=rf"measured on NVIDIA B200, the system has {H100}; leave it out"):
        Efficiency(SYSTEM, [calibration(measured(DENSE, 1e-3), gpu="NVIDIA B200")])


def test_only_the_files_of_the_gpu_are_read(tmp_path: Path) -> None:
    for gpu in (H100, "NVIDIA B200"):
        folder = tmp_path / "calibration" / gpu.replace(" ", "_")
        folder.mkdir(parents=True)
        (folder / "one.json").write_text(calibration(measured(DENSE, 1e-3), gpu=gpu).model_dump_json())
    assert SYSTEM.gpu is not None
    files = read_calibrations(SYSTEM.gpu, tmp_path)
    assert [file.provenance.gpu.name for file in files] == [H100]
    assert read_calibrations(SYSTEM.gpu, tmp_path / "none") == ()
