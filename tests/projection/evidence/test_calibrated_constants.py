"""Constants of the projection from planted measurements, and what a file may not decide."""

from __future__ import annotations

from typing import Any

import pytest

from moe_bench.errors import BadInputError
from moe_bench.projection.constants import Constants
from moe_bench.projection.evidence.calibrated_constants import calibrated_constants, constants_for
from moe_bench.projection.evidence.grade import Grade
from moe_bench.projection.evidence.rates import KERNEL_START_S, MEMORY_HBM_FRACTION
from moe_bench.results.calibration import CPU, Calibration
from moe_bench.spec.catalogue import recipes_root
from moe_bench.spec.load import Loader
from tests.projection.evidence.test_calibrated_shapes import DENSE, calibration, measured

SYSTEM = Loader(root=recipes_root(), rules=()).system("h100_sxm")
LAYER = {
    "operation": "moe_layer",
    "num_tokens": 8192,
    "hidden_size": 7168,
    "expert_ffn_hidden_size": 2048,
    "num_experts": 4,
    "top_k": 2,
}
NORM = {
    "operation": "norm",
    "variant": "rmsnorm",
    "shape": (1000, 1000),
    "num_read_bytes": 2_000_000_000,
    "num_written_bytes": 1_350_000_000,
}


def held(work: dict[str, object], held_s: float, *samples_s: float) -> dict[str, Any]:
    what = {"operation": "sustained", "work": work, "held_s": held_s}
    return measured(what, 1.0) | {"samples_s": samples_s}


def constants(*measurements: dict[str, Any], with_shapes: bool = True) -> Constants:
    return constants_for(SYSTEM, [calibration(*measurements)], with_shapes=with_shapes).constants


def test_what_is_held_counts_from_its_second_half() -> None:
    files = (held(DENSE, 0.0, 0.8, 0.9), held(DENSE, 30.0, 0.85, 0.85, 1.0, 1.0))
    assert constants(*files).sustained_fraction == pytest.approx(0.85)


def test_a_layer_says_more_of_a_step_than_a_product_alone() -> None:
    product = (held(DENSE, 0.0, 0.7), held(DENSE, 30.0, 1.0))
    layer = (held(LAYER, 0.0, 0.9), held(LAYER, 30.0, 1.0))
    assert constants(*product, *layer).sustained_fraction == pytest.approx(0.9)


def test_without_a_burst_nothing_is_said_of_what_is_sustained() -> None:
    found = constants_for(SYSTEM, [calibration(held(DENSE, 30.0, 1.0))])
    assert found.constants == Constants()
    assert found.grade("sustained_fraction") is Grade.FITTED


def test_launching_is_that_of_whole_layers_not_of_bare_kernels() -> None:
    bare = measured({"operation": "launch", "num_kernels": 500}, 2e-3)
    layers = measured({"operation": "launch", "num_kernels": 1000, "layers_of": "a_model"}, 2e-2)
    assert constants(bare).launch_s == Constants().launch_s
    found = constants_for(SYSTEM, [calibration(bare, layers)])
    assert found.constants.launch_s == pytest.approx(2e-5)
    assert found.grade("launch_s") is Grade.MEASURED_HERE
    assert found.grade("nic_fraction") is Grade.FITTED


def test_memory_bound_kernels_have_the_share_of_their_bytes_after_the_kernels_start() -> None:
    # 3.35 GB at 3.35 TB/s would take 1 ms; half of the bandwidth, 2 ms
    slow = measured(NORM, 2e-3 + KERNEL_START_S)
    assert constants(slow, with_shapes=False).memory_fraction == pytest.approx(0.5)
    fast = measured(NORM, 1.25e-3 + KERNEL_START_S, implementation="another")
    assert constants(slow, fast, with_shapes=False).memory_fraction == pytest.approx(0.8)


def test_priced_by_shape_memory_bound_kernels_take_what_was_measured() -> None:
    assert constants(measured(NORM, 1.25e-3)).memory_fraction == MEMORY_HBM_FRACTION


def test_an_optimizer_step_gives_the_share_of_streams() -> None:
    step = NORM | {"operation": "optimizer_step", "variant": "adam"}
    assert constants(measured(step, 1.25e-3 + KERNEL_START_S)).stream_fraction == pytest.approx(0.8)


def test_other_gpus_and_toy_shapes_change_nothing() -> None:
    files = (held(DENSE, 0.0, 0.5), held(DENSE, 30.0, 1.0))
    tiny = calibration(*files).model_copy(update={"is_tiny": True})
    others = [calibration(*files, gpu="NVIDIA B200"), calibration(*files, gpu=CPU), tiny]
    assert constants_for(SYSTEM, others).constants == Constants()
    assert constants_for(SYSTEM, others).sources == {}


@pytest.mark.parametrize(
    "change", [{"is_tiny": True}, {"gpu": CPU}, {"gpu": "NVIDIA B200"}], ids=["tiny", "cpu", "other"]
)
def test_what_is_no_evidence_is_refused_by_name(change: dict[str, Any]) -> None:
    gpu = {"gpu": change["gpu"]} if "gpu" in change else {}
    file: Calibration = calibration(measured(DENSE, 1e-3), **gpu)
    file = file.model_copy(update={"is_tiny": change.get("is_tiny", False)})
    assert SYSTEM.gpu is not None
    with pytest.raises(BadInputError, match="says nothing about NVIDIA H100 80GB HBM3; leave it out"):
        calibrated_constants([file], SYSTEM.gpu, Constants(), with_shapes=True)


def test_a_system_without_a_gpu_keeps_its_constants() -> None:
    host = Loader(root=recipes_root(), rules=()).system("cpu_host")
    assert constants_for(host, [calibration(measured(DENSE, 1e-3))]).constants == Constants()
