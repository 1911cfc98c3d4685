"""Laws of kernels against hand counts, and what GPUs and number formats without evidence are told."""

from __future__ import annotations

import pytest

from moe_bench.errors import BadInputError
from moe_bench.projection.evidence.grade import Grade
from moe_bench.projection.evidence.rates import AttentionRate, gemm_rate, gpu_rates
from moe_bench.projection.work.operations import Number
from moe_bench.spec.catalogue import recipes_root
from moe_bench.spec.load import Loader
from moe_bench.spec.system import GpuSpec

LOADER = Loader(root=recipes_root(), rules=())


def gpu_of(system: str) -> GpuSpec:
    gpu = LOADER.system(system).gpu
    assert gpu is not None
    return gpu


def changed(gpu: GpuSpec, **values: object) -> GpuSpec:
    return GpuSpec.model_validate(gpu.model_dump() | values)


def test_attention_reaches_half_of_its_limit_at_half_tokens() -> None:
    rate = AttentionRate(600e12, 1000)
    assert rate.flops_per_s(1000) == 300e12
    assert rate.flops_per_s(3000) == 450e12


def test_the_law_passes_through_the_published_points_of_cudnn() -> None:
    # arXiv:2603.07685, table 9: Hopper 553 and 422 at 4,096 tokens, 638 and 523 at 16,384
    rates = gpu_rates(gpu_of("h100_sxm"))
    for num_tokens, is_forward, published in (
        (4096, True, 553e12),
        (4096, False, 422e12),
        (16384, True, 638e12),
        (16384, False, 523e12),
    ):
        rate = rates.attention_flops_per_s(head_dim=160, num_tokens=num_tokens, is_forward=is_forward)
        assert rate == pytest.approx(published, rel=0.01)


def test_a_head_dimension_between_two_measured_ones_has_a_rate_between_theirs() -> None:
    rates = gpu_rates(gpu_of("h100_sxm"))

    def rate(head_dim: float) -> float:
        return rates.attention_flops_per_s(head_dim=head_dim, num_tokens=8192, is_forward=True)

    assert rate(64) < rate(96) < rate(128)
    assert rate(32) == rate(64)
    assert rate(512) == rate(256)


def test_a_gpu_with_the_chip_of_another_has_its_rates() -> None:
    assert gpu_rates(gpu_of("h800")).gemm == gpu_rates(gpu_of("h100_sxm")).gemm
    assert gpu_rates(gpu_of("h800")).grade is Grade.PUBLISHED


def test_an_unmeasured_gpu_is_scaled_from_its_architecture_and_says_so() -> None:
    h100 = gpu_of("h100_sxm")
    half = changed(h100, device_name="NVIDIA H50", bf16_flops_per_s=h100.bf16_flops_per_s / 2)
    rates, whole = gpu_rates(half), gpu_rates(h100)
    assert rates.grade is Grade.PRIOR
    assert "scaled" in rates.gemm_source
    bf16 = rates.gemm[Number.BF16].limit_flops_per_s
    assert bf16 == pytest.approx(whole.gemm[Number.BF16].limit_flops_per_s / 2)


def test_a_number_format_that_the_gpu_lacks_is_refused_on_one_line() -> None:
    with pytest.raises(BadInputError) as refused:
        gemm_rate(gpu_rates(gpu_of("h100_sxm")), Number.NVFP4, device_name="NVIDIA H100 80GB HBM3")
    assert str(refused.value) == (
        "NVIDIA H100 80GB HBM3: no measured rate of products in nvfp4; known: bf16, fp8_blockwise, "
        "fp8_tensorwise; change the precision"
    )


@pytest.mark.parametrize("system", ["h100_sxm", "h200", "h800", "b200", "gb200_nvl72", "gb300_nvl72"])
def test_no_rate_is_above_the_datasheet(system: str) -> None:
    gpu = gpu_of(system)
    peaks = {Number.BF16: gpu.bf16_flops_per_s, Number.NVFP4: gpu.fp4_flops_per_s}
    for number, rate in gpu_rates(gpu).gemm.items():
        peak = peaks.get(number, gpu.fp8_flops_per_s)
        assert peak is not None
        assert 0.4 * peak < rate.limit_flops_per_s < peak
        assert 0.25 < rate.hbm_fraction < 1


def test_long_work_slows_other_gpus_more_than_an_h100() -> None:
    """Medians of docs/rates.md: 705 of 765 TFLOP/s on an H100, 1,228 of 1,471 on a B200."""
    keys = ("h100_sxm", "b200", "gb200_nvl72", "gb300_nvl72")
    ratios = {key: gpu_rates(gpu_of(key)).sustained_ratio for key in keys}
    assert ratios["h100_sxm"] == 1
    assert ratios["b200"] == pytest.approx(0.906, abs=0.001)
    assert ratios["b200"] < ratios["gb200_nvl72"] < ratios["gb300_nvl72"] < 1
