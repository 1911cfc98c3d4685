"""Public tables as evidence, with made-up ones in their place, and with the real ones where installed."""

from __future__ import annotations

from importlib import util

import numpy as np
import pytest

from moe_bench.errors import MissingRequirementError
from moe_bench.projection.efficiency import Efficiency
from moe_bench.projection.evidence import table_shapes, tables
from moe_bench.projection.evidence.grade import Grade
from moe_bench.projection.evidence.tables import AttentionTable, GemmTable
from moe_bench.projection.work.operations import AttentionCore, Gemm, MemoryBound, Number, Part, Pass
from moe_bench.spec.catalogue import recipes_root
from moe_bench.spec.load import Loader

SYSTEM = Loader(root=recipes_root(), rules=()).system("h100_sxm")
LAW = Efficiency(SYSTEM)


def product(number: Number = Number.BF16, *, groups: int = 1, accumulates: bool = False) -> Gemm:
    return Gemm(
        part=Part.DENSE_MLP,
        in_pass=Pass.FORWARD,
        num_rows=4096,
        num_inner=7168,
        num_columns=2048,
        num_groups=groups,
        number=number,
        accumulates=accumulates,
    )


def core(seq_len: int = 4096, in_pass: Pass = Pass.FORWARD, dim: int = 128) -> AttentionCore:
    return AttentionCore(
        in_pass=in_pass, num_flops=4e11, seq_len=seq_len, context=1, qk_head_dim=dim, v_head_dim=dim
    )


def gemm_table(time_s: float) -> GemmTable:
    one = np.ones(1)
    return GemmTable(num_rows=4096 * one, num_inner=7168 * one, num_columns=2048 * one, time_s=time_s * one)


def attention_table(time_s: float) -> AttentionTable:
    one = np.ones(1)
    # 4 x 128 x 4096 x 4097 / 2 FLOPs per head and sequence
    heads = 4e11 / (4 * 128 * 4096 * 4097 / 2)
    return AttentionTable(
        num_seqs=one,
        seq_len=4096 * one,
        num_heads=heads * one,
        num_query_groups=one,
        head_dim=128 * one,
        window_tokens=0 * one,
        time_s=time_s * one,
    )


@pytest.fixture
def from_tables(monkeypatch: pytest.MonkeyPatch) -> Efficiency:
    """Costs from tables of one shape each: 1 ms, in FP8 with its quantization."""
    products = {Number.BF16: gemm_table(1e-3), Number.FP8_TENSORWISE: gemm_table(1e-3)}
    monkeypatch.setattr(table_shapes, "package_version", lambda: "0.12.0")
    monkeypatch.setattr(table_shapes, "read_gemm_tables", lambda _, *, engine: products)
    monkeypatch.setattr(table_shapes, "read_attention_table", lambda _, *, engine: attention_table(1e-3))
    return Efficiency(SYSTEM, tables=True)


def test_a_product_of_the_table_is_answered_from_it(from_tables: Efficiency) -> None:
    cost = from_tables.gemm(product())
    assert cost.burst_s == pytest.approx(1e-3)
    assert (cost.grade, cost.source) == (Grade.MEASURED_ELSEWHERE, "aiconfigurator-core 0.12.0")


def test_quantization_is_taken_out_of_a_low_precision_product(from_tables: Efficiency) -> None:
    # 3 bytes of each of 4096 x 7168 elements at 1.33 TB/s, and a start 7.2 us longer than a product's alone
    quantization_s = 3 * 4096 * 7168 / 1.33e12 + 7.2e-6
    law_s = LAW.gemm(product(Number.FP8_TENSORWISE)).burst_s
    expected_s = law_s * 1e-3 / (law_s + quantization_s)
    assert from_tables.gemm(product(Number.FP8_TENSORWISE)).burst_s == pytest.approx(expected_s)


def test_forward_attention_is_answered_from_the_table(from_tables: Efficiency) -> None:
    assert from_tables.attention(core()).burst_s == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (product(groups=8), "no table of grouped products alone, without what surrounds them"),
        (product(accumulates=True), "no table of products that are added to a gradient"),
        (product(Number.FP8_BLOCKWISE), "no table of products in fp8_blockwise"),
        (core(in_pass=Pass.DGRAD), "no table of attention's backward pass"),
        (core(seq_len=128), "no table of windows"),
        (core(dim=64), "no table of attention with head dimension 64"),
        (
            MemoryBound(part=Part.NORMS, in_pass=Pass.FORWARD, num_bytes=1e8),
            "no table of operations bound by memory",
        ),
    ],
)
def test_what_no_table_has_is_answered_by_the_law_and_reported(
    from_tables: Efficiency, operation: Gemm | AttentionCore | MemoryBound, reason: str
) -> None:
    if isinstance(operation, Gemm):
        assert from_tables.gemm(operation) == LAW.gemm(operation)
    elif isinstance(operation, AttentionCore):
        assert from_tables.attention(operation) == LAW.attention(operation)
    else:
        assert from_tables.memory(operation) == LAW.memory(operation)
    assert [one.reason for one in from_tables.unanswered] == [reason]


def test_tables_that_are_not_installed_are_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "PACKAGE", "no-such-package")
    with pytest.raises(MissingRequirementError, match=r"pip install moe_bench\[prior\]"):
        Efficiency(SYSTEM, tables=True)


@pytest.mark.skipif(util.find_spec("aiconfigurator_core") is None, reason="needs moe_bench[prior]")
def test_the_real_tables_agree_with_the_law_that_was_fitted_to_them() -> None:
    efficiency = Efficiency(SYSTEM, tables=True)
    for number in (Number.BF16, Number.FP8_TENSORWISE, Number.FP8_BLOCKWISE):
        found, law = efficiency.gemm(product(number)), LAW.gemm(product(number))
        assert found.grade is Grade.MEASURED_ELSEWHERE
        assert found.burst_s == pytest.approx(law.burst_s, rel=0.25)
    assert efficiency.attention(core()).burst_s == pytest.approx(LAW.attention(core()).burst_s, rel=0.25)
