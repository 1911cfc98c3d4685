"""Comparisons on disk: written once, found again for either side, and what tables say of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_bench.report.parity_plot import write_parity_plot
from moe_bench.report.parity_view import (
    parity_json,
    parity_line,
    parity_mark,
    steps_shown,
    verdict_text,
)
from moe_bench.results.parity import (
    Parity,
    ParitySide,
    latest_parity,
    read_parities,
    read_parity,
    write_parity,
)
from moe_bench.results.record import GitState
from moe_bench.results.store import record_files
from moe_bench.results.verification import VerificationProvenance
from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.load import Loader
from moe_bench.spec.scale import Plan, full_plan

TENSOR = "parallel.tensor=2"


def plan(*modified: str, name: str = "mixtral_8x7b") -> Plan:
    loader = Loader(root=recipes_root(), rules=())
    return full_plan(loader.recipe(find_recipe(name, loader)), modified=modified)


def parity(*variant_losses: float, second: int = 0) -> Parity:
    return Parity(
        provenance=VerificationProvenance(
            started_at=f"2026-11-22T12:00:0{second}+00:00",
            command=("moe-bench", "parity", "mixtral_8x7b"),
            job_id="pid1",
            git=GitState(commit="0123456789", branch="main", is_dirty=False),
            python_version="3.12.1",
            packages={},
            host="node",
            cpu_model=None,
            os="Linux",
        ),
        data="moby",
        num_data_tokens=1000,
        varied=(TENSOR,),
        base=ParitySide(plan=plan(), losses=(5.0, 4.0)),
        variant=ParitySide(plan=plan(TENSOR), losses=variant_losses),
        nudge_fraction=2.0**-24,
        repeats=((5.0, 4.0 + 1e-6), (5.0, 4.0 - 1e-6)),
    )


def test_a_comparison_is_read_back_and_is_no_record_of_a_run(tmp_path: Path) -> None:
    path = write_parity(tmp_path, parity(5.0, 4.0))
    assert path.parent == tmp_path / "parity" / plan().asked
    assert read_parity(path) == parity(5.0, 4.0)
    assert list(record_files(str(tmp_path))) == []
    assert write_parity(tmp_path, parity(5.0, 4.0)) != path


def test_the_newest_of_the_same_settings_is_found_for_either_side(tmp_path: Path) -> None:
    older, newer = parity(5.0, 4.0), parity(5.0, 4.5, second=1)
    for one in (newer, older):
        write_parity(tmp_path, one)
    found = read_parities(tmp_path, models=["mixtral_8x7b", "deepseek_v3"])
    assert found == (newer, older)
    assert latest_parity(found, plan()) == newer
    assert latest_parity(found, plan(TENSOR)) == newer
    assert latest_parity(found, plan("precision=fp32")) is None
    assert latest_parity(found, plan(name="deepseek_v3")) is None


def test_what_is_equal_says_what_it_would_not_have_seen() -> None:
    equal = parity(5.0, 4.0 + 2e-5)
    assert equal.is_equal
    assert verdict_text(equal) == "equal over 2 steps; less than 7.9e-06 of the loss would not be seen"
    assert parity_json(equal, Path("file"))["is_equal"] is True


def test_what_differs_says_from_which_step_on() -> None:
    different = parity(5.0, 4.5)
    assert different.first_different_step == 2
    assert verdict_text(different).startswith(
        "differs from step 2: losses 4.000000 and 4.500000, apart by 0.5 "
    )


def test_a_run_without_a_comparison_is_unproven() -> None:
    assert [parity_mark(one) for one in (None, parity(5.0, 4.0), parity(5.0, 4.5))] == [
        "unproven",
        "equal",
        "differs",
    ]
    assert parity_line(None, plan()).startswith("unproven: ")


@pytest.mark.parametrize("num_steps", [1, 12, 13, 500])
def test_a_table_shows_a_dozen_steps_and_the_one_that_differs(num_steps: int) -> None:
    losses = (4.0,) * num_steps
    wrong = (*losses[:-2], 9.0, *losses[-1:])[:num_steps]
    one = parity(5.0, 4.0).model_copy(
        update={
            "base": ParitySide(plan=plan(), losses=losses),
            "variant": ParitySide(plan=plan(TENSOR), losses=wrong),
            "repeats": (losses, losses),
        }
    )
    shown = steps_shown(one)
    assert {0, num_steps - 1} <= set(shown)
    assert len(shown) <= 14
    assert one.first_different_step is None or one.first_different_step - 1 in shown


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    write_parity_plot(parity(5.0, 4.0), tmp_path / "parity.svg")
    assert "mixtral_8x7b" in (tmp_path / "parity.svg").read_text()
