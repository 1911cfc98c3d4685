"""Costs of operations: hand counts, invariants, and laws held against public measurements."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_bench.errors import BadInputError
from moe_bench.projection.efficiency import Cost, Efficiency, Scale
from moe_bench.projection.evidence.grade import Grade
from moe_bench.projection.work.operations import AttentionCore, Gemm, MemoryBound, Number, Part, Pass
from moe_bench.spec.catalogue import recipes_root
from moe_bench.spec.load import Loader

LOADER = Loader(root=recipes_root(), rules=())
SYSTEMS = ("h100_sxm", "h200", "h800", "b200", "gb200_nvl72", "gb300_nvl72")
BY_GPU = {
    system.gpu.device_name: Efficiency(system)
    for system in map(LOADER.system, SYSTEMS)
    if system.gpu is not None
}
H100 = BY_GPU["NVIDIA H100 80GB HBM3"]
PUBLIC: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "fixtures" / "public_kernels.json").read_text(encoding="utf-8")
)["kernels"]


def gemm(
    rows: float,
    inner: float,
    columns: float,
    *,
    groups: int = 1,
    number: Number = Number.BF16,
    in_pass: Pass = Pass.FORWARD,
    accumulates: bool = False,
) -> Gemm:
    return Gemm(
        part=Part.EXPERTS,
        in_pass=in_pass,
        num_rows=rows,
        num_inner=inner,
        num_columns=columns,
        num_groups=groups,
        number=number,
        accumulates=accumulates,
    )


def attention(
    *, seqs: int, seq_len: int, heads: int, dim: int, window: int = 0, in_pass: Pass = Pass.FORWARD
) -> AttentionCore:
    reach = min(window or seq_len, seq_len)
    pairs = reach * (reach + 1) / 2 + (seq_len - reach) * reach
    return AttentionCore(
        in_pass=in_pass,
        num_flops=seqs * heads * pairs * 4 * dim * (1 if in_pass is Pass.FORWARD else 2.5),
        seq_len=reach,
        context=1,
        qk_head_dim=dim,
        v_head_dim=dim,
    )


def test_a_product_costs_what_its_work_and_bytes_say() -> None:
    cost = H100.gemm(gemm(4096, 7168, 2048))
    # 2 x 4096 x 7168 x 2048 FLOPs at 806 TFLOP/s; (4096 + 2048) x 7168 and 4096 x 2048 elements of 2 bytes
    assert cost.compute_s == pytest.approx(120_259_084_288 / 806e12)
    assert cost.memory_s == pytest.approx(2 * (44_040_192 + 8_388_608) / 3.35e12)
    assert cost.burst_s == pytest.approx(math.hypot(cost.compute_s, cost.memory_s / 0.75) + 3e-6)
    assert (cost.scale, cost.grade) == (Scale.GEMM, Grade.PUBLISHED)


def test_a_format_that_reaches_less_bandwidth_counts_its_bytes_longer() -> None:
    operation = gemm(4096, 7168, 2048, number=Number.FP8_BLOCKWISE)
    cost = H100.gemm(operation)
    assert cost.scale is Scale.LOW_PRECISION_GEMM
    assert cost.memory_s == pytest.approx(operation.num_bytes / 3.35e12 * 0.75 / 0.41)


def test_adding_to_an_fp32_gradient_streams_six_more_bytes_per_element() -> None:
    low, added = (
        H100.gemm(gemm(4096, 7168, 2048, number=Number.FP8_BLOCKWISE, accumulates=accumulates))
        for accumulates in (False, True)
    )
    assert added.memory_s - low.memory_s == pytest.approx(6 * 4096 * 2048 / 3.35e12)
    assert added.compute_s == low.compute_s


def test_quantization_reaches_more_of_the_bandwidth_than_other_operations_bound_by_memory() -> None:
    quantization = MemoryBound(part=Part.QUANTIZATION, in_pass=Pass.FORWARD, num_bytes=3.35e9)
    cost = H100.memory(quantization)
    assert cost.burst_s == pytest.approx(1e-3 / 0.58 + 3e-6)
    assert cost.grade is Grade.PUBLISHED


def test_a_grouped_product_starts_each_of_its_groups() -> None:
    cost = H100.gemm(gemm(512, 7168, 4096, groups=8, in_pass=Pass.DGRAD))
    assert cost.overhead_s == pytest.approx(3e-6 + 8 * 5.7e-6)
    assert cost.compute_s == pytest.approx(8 * 2 * 512 * 7168 * 4096 / 806e12)


def test_the_gradient_of_grouped_weights_is_the_slowest_of_the_three_products() -> None:
    forward = H100.gemm(gemm(512, 7168, 4096, groups=32))
    wgrad = H100.gemm(gemm(4096, 512, 7168, groups=32, in_pass=Pass.WGRAD, accumulates=True))
    assert wgrad.burst_s > 1.3 * forward.burst_s


def test_an_operation_bound_by_memory_costs_its_bytes() -> None:
    operation = MemoryBound(part=Part.NORMS, in_pass=Pass.FORWARD, num_bytes=3.35e9)
    assert H100.memory(operation).memory_s == pytest.approx(1e-3)
    assert H100.memory(operation).scale is Scale.MEMORY
    assert H100.memory(operation).grade is Grade.PRIOR
    assert H100.stream(3.35e9).scale is Scale.STREAM


def test_attention_counts_the_sequence_that_one_rank_holds() -> None:
    whole = attention(seqs=1, seq_len=32768, heads=8, dim=128)
    shared = AttentionCore(
        in_pass=Pass.FORWARD,
        num_flops=whole.num_flops,
        seq_len=32768,
        context=8,
        qk_head_dim=128,
        v_head_dim=128,
    )
    assert H100.attention(shared).compute_s > H100.attention(whole).compute_s


@given(
    rows=st.integers(64, 32768),
    inner=st.integers(64, 16384),
    columns=st.integers(64, 16384),
    groups=st.integers(1, 64),
    in_pass=st.sampled_from(Pass),
    name=st.sampled_from(sorted(BY_GPU)),
)
def test_more_rows_columns_or_inner_size_never_cost_less(
    rows: int, inner: int, columns: int, groups: int, in_pass: Pass, name: str
) -> None:
    def cost(rows: int, inner: int, columns: int) -> Cost:
        return BY_GPU[name].gemm(gemm(rows, inner, columns, groups=groups, in_pass=in_pass))

    least = cost(rows, inner, columns).burst_s
    assert cost(rows + 1, inner, columns).burst_s > least
    assert cost(rows, inner + 1, columns).burst_s > least
    assert cost(rows, inner, columns + 1).burst_s > least


@given(seq_len=st.integers(1024, 131072), dim=st.integers(32, 512), in_pass=st.sampled_from(Pass))
def test_longer_sequences_cost_more_and_per_operation_less(seq_len: int, dim: int, in_pass: Pass) -> None:
    short = attention(seqs=1, seq_len=seq_len, heads=8, dim=dim, in_pass=in_pass)
    long = attention(seqs=1, seq_len=2 * seq_len, heads=8, dim=dim, in_pass=in_pass)
    short_s, long_s = (H100.attention(one).compute_s for one in (short, long))
    assert long_s > short_s
    assert long_s / long.num_flops < short_s / short.num_flops


def test_a_system_without_a_gpu_is_refused_on_one_line() -> None:
    with pytest.raises(BadInputError, match=r"cpu_host: gpu: null, so no rate is known"):
        Efficiency(LOADER.system("cpu_host"))


def law_error(kernel: dict[str, Any]) -> float:
    """Law over measured, less one."""
    efficiency = BY_GPU[kernel["gpu"]]
    if kernel["what"] == "attention":
        operation = attention(
            seqs=kernel["num_seqs"],
            seq_len=kernel["seq_len"],
            heads=kernel["num_heads"],
            dim=kernel["head_dim"],
            window=kernel["window_tokens"],
        )
        return 1e6 * efficiency.attention(operation).burst_s / kernel["time_us"] - 1
    if kernel["what"] == "product":
        product = gemm(kernel["rows"], kernel["inner"], kernel["columns"], number=Number(kernel["number"]))
        return 1e6 * efficiency.gemm(product).burst_s / kernel["time_us"] - 1
    rows, inputs, outputs = kernel["rows"], kernel["inputs"], kernel["outputs"]
    in_pass = Pass(kernel["direction"])
    sizes = {
        Pass.FORWARD: (rows, inputs, outputs),
        Pass.DGRAD: (rows, outputs, inputs),
        Pass.WGRAD: (outputs, rows, inputs),
    }[in_pass]
    grouped = gemm(*sizes, groups=kernel["groups"], in_pass=in_pass, accumulates=in_pass is Pass.WGRAD)
    return 1e6 * efficiency.gemm(grouped).burst_s / kernel["time_us"] - 1


def errors_of(what: str, **fields: object) -> list[float]:
    chosen = [
        kernel
        for kernel in PUBLIC
        if kernel["what"] == what and all(kernel[name] == value for name, value in fields.items())
    ]
    assert len(chosen) >= 3
    return [law_error(kernel) for kernel in chosen]


def test_products_are_within_a_tenth_of_public_measurements() -> None:
    errors = errors_of("product", number="bf16")
    assert len(errors) == 35
    assert statistics.median(map(abs, errors)) < 0.10
    assert max(map(abs, errors)) < 0.45


def test_low_precision_products_cost_less_than_measured_with_their_quantization_but_not_by_half() -> None:
    low = [kernel for kernel in PUBLIC if kernel.get("number") not in (None, "bf16")]
    assert len(low) == 26
    for kernel in low:
        assert -0.5 < law_error(kernel) < 0.05, kernel


@pytest.mark.parametrize("window_tokens", [0, 128])
def test_attention_is_within_a_fifth_of_public_measurements(window_tokens: int) -> None:
    errors = errors_of("attention", window_tokens=window_tokens)
    assert statistics.median(map(abs, errors)) < 0.1
    assert max(map(abs, errors)) < 0.2


@pytest.mark.parametrize("direction", ["forward", "dgrad", "wgrad"])
def test_grouped_products_are_as_much_slower_in_transformer_engine_as_its_dense_ones(direction: str) -> None:
    # on that B200 its dense products reach 1,128 of the law's 1,588 TFLOP/s: a sustained rate, not a burst
    for error in errors_of("grouped product", direction=direction):
        assert -0.45 < error < -0.05
