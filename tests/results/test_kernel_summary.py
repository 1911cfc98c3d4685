"""Kernels are told apart by their names, and add up."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_bench.results.kernel_summary import kernel_kind, kernel_lines, write_kernels


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        # names as H100 traces show them
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "GEMM"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "GEMM"),
        (
            "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<GemmUniversal<"
            "GroupProblemShape<Shape<int, int, int>>>>",
            "grouped GEMM",
        ),
        ("void flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("_permute_kernel", "routing and permutation"),
        ("void at::native::vectorized_elementwise_kernel<4, silu>", "elementwise"),
        ("Memcpy DtoD (Device -> Device)", "copies and fills"),
        ("void multi_tensor_apply_kernel<AdamFunctor>", "optimizer"),
        # of torch on a CPU
        ("aten::mm", "GEMM"),
        ("aten::_grouped_mm", "grouped GEMM"),
        ("aten::mul", "elementwise"),
        ("something", "other"),
    ],
)
def test_a_kernel_is_what_its_name_says(name: str, kind: str) -> None:
    assert kernel_kind(name) == kind


def test_shares_sum_to_one_and_the_longest_comes_first(tmp_path: Path) -> None:
    lines = kernel_lines([("aten::mul", 4, 1.0), ("aten::mm", 2, 3.0), ("aten::view", 9, 0.0)])
    assert [line.name for line in lines] == ["aten::mm", "aten::mul"]
    assert [line.time_fraction for line in lines] == [0.75, 0.25]
    path = tmp_path / "kernels.csv"
    write_kernels(path, lines)
    assert path.read_text().splitlines() == [
        "kind,kernel,calls,total_ms,mean_us,percent",
        "GEMM,aten::mm,2,3000.0000,1500000.00,75.00",
        "elementwise,aten::mul,4,1000.0000,250000.00,25.00",
    ]
