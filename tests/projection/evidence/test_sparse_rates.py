"""Priors of sparse attention against the kernel timings they come from, and one they were not fitted to."""

from __future__ import annotations

import pytest

from moe_bench.projection.evidence.sparse_rates import sparse_flops_per_s
from moe_bench.spec.catalogue import recipes_root
from moe_bench.spec.load import Loader
from moe_bench.spec.system import GpuSpec

LOADER = Loader(root=recipes_root(), rules=())


def gpu(name: str) -> GpuSpec:
    found = LOADER.system(name).gpu
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("num_keys", "tflops", "tolerance"), [(128, 306.6, 0.06), (512, 557.2, 0.01), (1024, 637.8, 0.01)]
)
def test_backward_meets_the_kernel_timings_of_cudnn_frontend_318(
    num_keys: int, tflops: float, tolerance: float
) -> None:
    rate = sparse_flops_per_s(gpu("b200"), num_keys=num_keys, is_forward=False)
    assert rate == pytest.approx(tflops * 1e12, rel=tolerance)


def test_forward_is_flashmlas_best_at_2048_keys() -> None:
    assert sparse_flops_per_s(gpu("h100_sxm"), num_keys=2048, is_forward=True) == pytest.approx(
        640e12, rel=0.01
    )
    assert sparse_flops_per_s(gpu("b200"), num_keys=2048, is_forward=True) == pytest.approx(1450e12, rel=0.01)
