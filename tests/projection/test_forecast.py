"""What a forecast says besides the step: what limits it, and what it rests on."""

from __future__ import annotations

import pytest

from moe_bench.projection.constants import Constants
from moe_bench.projection.forecast import UNCOUNTED_OFFLOAD, Basis, forecast
from moe_bench.projection.step import project
from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.load import Loader
from tests.projection.evidence.test_calibrated_constants import LAYER, NORM, held
from tests.projection.evidence.test_calibrated_shapes import calibration, measured

LOADER = Loader(root=recipes_root(), rules=())
DEEPSEEK = LOADER.recipe(find_recipe("deepseek_v3", LOADER))
B200 = LOADER.recipe(find_recipe("qwen3_30b_a3b/b200_8g_mxfp8", LOADER))
FILE = calibration(held(LAYER, 0.0, 0.7), held(LAYER, 30.0, 1.0), measured(NORM, 3e-3))
MEASURED = Basis(calibrations=(FILE,))


def test_without_a_basis_it_is_what_project_says() -> None:
    assert forecast(DEEPSEEK).projection.step_s == project(DEEPSEEK).step_s


def test_the_largest_terms_come_first() -> None:
    made = forecast(DEEPSEEK)
    seconds = sorted((term.seconds for term in made.projection.terms), reverse=True)
    assert [term.seconds for term in made.limits] == seconds[:3]


def test_measured_constants_take_the_place_of_fitted_ones_and_are_named() -> None:
    basis = MEASURED.calibrated(DEEPSEEK.system)
    assert basis.constants.sustained_fraction == pytest.approx(0.7)
    assert basis.constants.nic_fraction == Constants().nic_fraction
    made = forecast(DEEPSEEK, basis=basis)
    assert made.projection.step_s > forecast(DEEPSEEK).projection.step_s
    assert any(text.startswith("measured on this GPU: sustained_fraction") for text in made.assumptions)
    assert any("for want of a measurement" in text for text in made.assumptions)


def test_files_of_another_gpu_change_nothing() -> None:
    basis = MEASURED.calibrated(B200.system)
    assert basis.constants == Constants()
    assert forecast(B200, basis=basis).projection.step_s == forecast(B200).projection.step_s


def test_a_balanced_load_is_named_and_assumed() -> None:
    made = forecast(DEEPSEEK, load="balanced")
    assert made.load.name == "balanced"
    assert any("receives 1.00 times the mean" in text for text in made.assumptions)


def test_a_skewed_load_takes_time_and_memory() -> None:
    even, skewed = (forecast(DEEPSEEK, load=load) for load in ("balanced", "power_law:0.5"))
    assert skewed.projection.step_s > even.projection.step_s
    assert skewed.memory.worst.total_bytes > even.memory.worst.total_bytes


def test_offloading_is_said_to_cost_time_that_is_not_counted() -> None:
    offloaded = LOADER.recipe(find_recipe("deepseek_v3/h100_sxm_256g_fp8_blockwise_offload", LOADER))
    assert UNCOUNTED_OFFLOAD in forecast(offloaded).assumptions
    assert UNCOUNTED_OFFLOAD not in forecast(DEEPSEEK).assumptions
