"""Intervals are as wide as the errors on rows that the constants had not seen."""

from __future__ import annotations

import math

import pytest

from moe_bench.projection import interval as module
from moe_bench.projection.evidence.grade import Grade
from moe_bench.projection.evidence.rates import gpu_rates
from moe_bench.projection.interval import (
    DECIDING_FIELDS,
    DENSE,
    MOE,
    MOE_INFERRED,
    NUM_INFERRED,
    SCALED_RATES,
    half_widths,
    interval,
)
from moe_bench.projection.rows.rules import RULES
from moe_bench.projection.work.operations import Number
from moe_bench.report.accuracy_page import widths
from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Recipe
from tests.projection.registry import accuracy

LOADER = Loader(root=recipes_root(), rules=())
HALF_A_POINT = 0.005


def recipe(*, device_name: str | None = None) -> Recipe:
    changes = () if device_name is None else (f"system.gpu.device_name={device_name}",)
    return LOADER.recipe(find_recipe("qwen3_30b_a3b", LOADER), changes=changes)


def test_the_widths_are_those_of_the_cross_validation() -> None:
    for name, width in widths(accuracy("model")).items():
        stated = getattr(module, name)
        assert stated.p50_fraction == pytest.approx(width.p50_fraction, abs=HALF_A_POINT), name
        assert stated.p90_fraction == pytest.approx(width.p90_fraction, abs=HALF_A_POINT), name


def test_half_widths_are_quantiles_of_absolute_errors() -> None:
    found = half_widths([-0.1, 0.2, -0.3, 0.4, -0.5])
    assert found.p50_fraction == pytest.approx(0.3)
    assert found.p90_fraction == pytest.approx(0.46)


def test_an_interval_is_symmetric_in_the_logarithm_and_the_wide_one_holds_the_other() -> None:
    made = interval(recipe(), 2.0)
    assert made.p50.low_s * made.p50.high_s == pytest.approx(4.0)
    assert math.log(made.p90.high_s / 2.0) == pytest.approx(MOE.p90_fraction)
    assert made.p90.low_s < made.p50.low_s < 2.0 < made.p50.high_s < made.p90.high_s


def test_a_dense_model_has_the_interval_of_dense_rows() -> None:
    dense = recipe().model_copy(update={"model": recipe().model.model_copy(update={"moe": None})})
    assert math.log(interval(dense, 1.0).p90.high_s) == pytest.approx(DENSE.p90_fraction)


def test_a_row_that_prints_little_has_the_wider_interval_of_such_rows() -> None:
    fields = sorted(DECIDING_FIELDS)
    as_recipe = interval(recipe(), 1.0)
    assert interval(recipe(), 1.0, inferred_fields=[*fields[:NUM_INFERRED], "seq_len"]) == as_recipe
    inferred = interval(recipe(), 1.0, inferred_fields=fields[: NUM_INFERRED + 1])
    assert math.log(inferred.p90.high_s) == pytest.approx(MOE_INFERRED.p90_fraction)
    assert inferred.p50.high_s > as_recipe.p50.high_s


def test_deciding_fields_are_fields_of_rules() -> None:
    assert {rule.field for rule in RULES} >= DECIDING_FIELDS


def test_sparse_attention_widens_the_interval_and_says_so() -> None:
    model = recipe().model.model_copy(update={"compressed_attention": object()})
    sparse, plain = interval(recipe().model_copy(update={"model": model}), 1.0), interval(recipe(), 1.0)
    assert sparse.p90.high_s > plain.p90.high_s
    assert "sparse attention" in sparse.basis


def test_a_gpu_whose_rates_are_a_prior_has_a_wider_interval_and_says_so() -> None:
    known, unknown = interval(recipe(), 1.0), interval(recipe(device_name="NVIDIA H900"), 1.0)
    assert unknown.p50.high_s > known.p50.high_s
    assert unknown.p90.high_s > known.p90.high_s
    assert "scaled from another GPU" in unknown.basis


def test_scaling_rates_between_measured_gpus_errs_by_no_more_than_stated() -> None:
    """Every measured GPU projected as if it were unknown: its limit from that of its architecture."""
    systems = [LOADER.system(key) for key in ("h100_sxm", "h200", "b200", "gb200_nvl72", "gb300_nvl72")]
    errors = []
    for system in systems:
        assert system.gpu is not None
        own = gpu_rates(system.gpu)
        scaled = gpu_rates(system.gpu.model_copy(update={"device_name": "unknown"}))
        assert (own.grade, scaled.grade) == (Grade.PUBLISHED, Grade.PRIOR)
        limits = [rates.gemm[Number.BF16].limit_flops_per_s for rates in (own, scaled)]
        errors.append(abs(math.log(limits[0] / limits[1])))
    assert max(errors) == pytest.approx(SCALED_RATES.p90_fraction, abs=HALF_A_POINT)
