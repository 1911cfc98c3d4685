"""Shapes to be measured whatever the recipes: those behind constants, and a grid for recipes to come."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from moe_bench.projection.calibration.shapes import Shape
from moe_bench.results import calibration as measured
from moe_bench.results.calibration_tasks import ADAM, DEVICE_TO_DEVICE, DEVICE_TO_HOST, HOST_TO_DEVICE

HELD_S = 30.0
_TINY_HELD_S = 0.5


def _copy(variant: str, num_bytes: int) -> measured.MemoryBound:
    return measured.MemoryBound(
        operation="copy",
        variant=variant,
        shape=(num_bytes,),
        num_read_bytes=num_bytes,
        num_written_bytes=num_bytes,
    )


def constant_shapes(*, is_tiny: bool) -> Iterator[Shape]:
    """Work whose results are constants of the projection (`calibrated_constants`).

    The product is that of DeepSeek-V3's attention output over 16,384 tokens, the layer one rank's of EP64
    (four local experts, 4,096 rows each), attention its heads at 4,096 tokens.
    """
    scale = 64 if is_tiny else 1
    yield measured.Launch(operation="launch", num_kernels=500), "bf16"
    largest = 2**20 if is_tiny else 2**32
    for variant in (DEVICE_TO_DEVICE, HOST_TO_DEVICE, DEVICE_TO_HOST):
        yield _copy(variant, largest), "bf16"
        yield _copy(variant, largest // 64), "bf16"
    num_params = 2**14 if is_tiny else 2**29
    yield (
        measured.MemoryBound(
            operation="optimizer_step",
            variant=ADAM,
            shape=(num_params,),
            num_read_bytes=16 * num_params,
            num_written_bytes=12 * num_params,
        ),
        "fp32",
    )
    held: tuple[measured.MoeLayer | measured.DenseGemm | measured.AttentionCore, ...] = (
        measured.MoeLayer(
            operation="moe_layer",
            num_tokens=8192 // scale,
            hidden_size=7168 // scale,
            expert_ffn_hidden_size=2048 // scale,
            num_experts=4,
            top_k=2,
        ),
        measured.DenseGemm(
            operation="dense_gemm",
            num_rows=16384 // scale,
            num_inner=16384 // scale,
            num_columns=7168 // scale,
        ),
        measured.AttentionCore(
            operation="attention",
            direction="forward",
            num_seqs=1,
            seq_len=4096 // scale,
            num_heads=128 // scale,
            num_query_groups=128 // scale,
            qk_head_dim=192 // (4 if is_tiny else 1),
            v_head_dim=128 // (4 if is_tiny else 1),
        ),
    )
    for work in held:
        for held_s in (0.0, _TINY_HELD_S if is_tiny else HELD_S):
            yield measured.Sustained(operation="sustained", work=work, held_s=held_s), "bf16"


def grid_shapes() -> Iterator[Shape]:
    """Shapes between and beyond those of the recipes, for recipes to come."""
    for rows, inner, columns in product((1024, 4096, 16384), (1024, 4096, 16384), (1024, 4096, 16384)):
        what = {"operation": "dense_gemm", "num_rows": rows, "num_inner": inner, "num_columns": columns}
        yield measured.DenseGemm.model_validate(what), "bf16"
    directions: tuple[measured.Direction, ...] = ("forward", "dgrad", "wgrad")
    for num_groups, tokens, direction in product((4, 16, 64), (128, 1024, 8192), directions):
        grouped = measured.GroupedGemm(
            operation="grouped_gemm",
            direction=direction,
            tokens_per_expert=(tokens,) * num_groups,
            num_inputs=4096,
            num_outputs=2048,
            accumulates_fp32=direction == "wgrad",
        )
        yield grouped, "bf16"
    for seq_len, dim, backward in product((2048, 8192, 32768), (64, 128), (False, True)):
        attention = measured.AttentionCore(
            operation="attention",
            direction="backward" if backward else "forward",
            num_seqs=1,
            seq_len=seq_len,
            num_heads=32,
            num_query_groups=8,
            qk_head_dim=dim,
            v_head_dim=dim,
        )
        yield attention, "bf16"
