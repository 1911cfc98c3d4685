"""The fit finds planted constants, bears wrong rows, and the shipped constants are its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moe_bench.projection.accuracy.fit import Observations, fitted, left_out, projected_tokens_per_s
from moe_bench.projection.accuracy.memory import as_they_ran, load_evidence
from moe_bench.projection.accuracy.step_time import Projectable, observations, projectable
from moe_bench.projection.constants import FITTED, PRIOR, PRIOR_SPREAD, Constants
from moe_bench.projection.rows.inference import load_catalogue
from moe_bench.results.published import load_rows
from moe_bench.spec.catalogue import data_root

PLANTED = replace(
    PRIOR,
    sustained_fraction=0.80,
    fp4_gain_factor=1.2,
    memory_fraction=0.40,
    nic_fraction=0.85,
    launch_s=26e-6,
)


@pytest.fixture(scope="module")
def found() -> Projectable:
    root = data_root()
    published = root / "results" / "published"
    rows = as_they_ran(load_rows(published), load_evidence(published / "known"))
    return projectable(rows, load_catalogue(root / "recipes"))


@pytest.fixture(scope="module")
def observed(found: Projectable) -> Observations:
    return observations(found, start=PRIOR)


def planted(observed: Observations) -> Observations:
    """The rows as if they had been run under `PLANTED`."""
    return replace(observed, tokens_per_s_per_gpu=projected_tokens_per_s(observed, PLANTED))


def test_planted_constants_are_found_again(observed: Observations) -> None:
    rows = planted(observed)
    constants = fitted(rows, keep=rows.weight > 0, start=PRIOR)
    for name in FITTED:
        assert getattr(constants, name) == pytest.approx(getattr(PLANTED, name), rel=0.03), name


def test_a_tenth_of_wrong_rows_hardly_moves_the_constants(observed: Observations) -> None:
    rows = planted(observed)
    wrong = rows.tokens_per_s_per_gpu.copy()
    wrong[::10] *= 0.4
    constants = fitted(replace(rows, tokens_per_s_per_gpu=wrong), keep=rows.weight > 0, start=PRIOR)
    for name in FITTED:
        assert getattr(constants, name) == pytest.approx(getattr(PLANTED, name), rel=0.06), name


def test_rows_without_weight_do_not_move_a_fit(observed: Observations) -> None:
    rows = planted(observed)
    tripled = np.where(rows.weight > 0, 1.0, 3.0) * rows.tokens_per_s_per_gpu
    other = replace(rows, tokens_per_s_per_gpu=tripled)
    first, second = (fitted(one, keep=one.weight > 0, start=PRIOR) for one in (rows, other))
    assert first == second


def test_a_fold_is_projected_without_its_own_rows(observed: Observations) -> None:
    rows = planted(observed)
    folds = np.where(np.arange(len(rows.weight)) % 2 == 0, "even", "odd")
    halved = replace(
        rows, tokens_per_s_per_gpu=np.where(folds == "odd", 0.5, 1.0) * rows.tokens_per_s_per_gpu
    )
    _, by_fold = left_out(halved, folds=folds, start=PRIOR)
    # constants for the odd rows come from the even ones, which say nothing of their being halved
    assert by_fold["odd"].sustained_fraction == pytest.approx(PLANTED.sustained_fraction, rel=0.03)
    assert by_fold["even"].sustained_fraction < 0.9 * PLANTED.sustained_fraction


def test_the_shipped_constants_are_a_fit_to_all_rows(observed: Observations) -> None:
    again = fitted(observed, keep=observed.weight > 0, start=PRIOR)
    for name in FITTED:
        assert getattr(Constants(), name) == pytest.approx(getattr(again, name), rel=0.02), name


def test_every_fitted_constant_has_a_prior_spread() -> None:
    assert set(PRIOR_SPREAD) == set(FITTED)


def test_what_is_not_fitted_is_the_same_before_and_after() -> None:
    assert PRIOR.with_values(FITTED, Constants().values(FITTED)) == Constants()
