"""Comparisons on disk: written once, found again for what they speak of, and what tables say of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from moe_bench.report.parity_plot import write_parity_plot
from moe_bench.report.parity_view import (
    evidence_line,
    evidence_view,
    grouped,
    parity_json,
    parity_view,
    steps_shown,
    verdict_text,
)
from moe_bench.report.recipe_list import parity_mark
from moe_bench.results.parity import (
    Evidence,
    Learned,
    Parity,
    ParitySide,
    evidence_of,
    read_parities,
    read_parity,
    write_parity,
)
from moe_bench.results.record import GitState
from moe_bench.results.store import record_files
from moe_bench.results.verification import VerificationProvenance
from moe_bench.results.versioned import RecordError
from moe_bench.spec.catalogue import data_root, find_recipe, recipe_model_keys, recipes_root
from moe_bench.spec.derive_parity import fp32_plan, plain_plan
from moe_bench.spec.load import Loader
from moe_bench.spec.scale import Plan, full_plan, smoke_plan

LOADER = Loader(root=recipes_root(), rules=())
NAME = "mixtral_8x7b/h100_sxm_64g_bf16"
NORMS = (2.0, 2.0)


def plan(*changes: str, name: str = NAME) -> Plan:
    return full_plan(LOADER.recipe(find_recipe(name, LOADER), changes=changes), modified=changes)


def toy(*changes: str, name: str = NAME) -> Plan:
    recipe = LOADER.recipe(find_recipe(name, LOADER), changes=changes)
    return smoke_plan(recipe, host=LOADER.system("cpu_host"), modified=changes)


def learned(*losses: float) -> Learned:
    return Learned(losses=losses, grad_norms=NORMS)


def parity(
    *variant_losses: float, variant: Plan | None = None, norms: tuple[float, ...] = NORMS, second: int = 0
) -> Parity:
    variant = variant or toy()
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
        varied=("parallel.pipeline=2",),
        base=ParitySide(plan=plain_plan(variant), learned=learned(5.0, 4.0)),
        variant=ParitySide(plan=variant, learned=Learned(losses=variant_losses, grad_norms=norms)),
        nudge_fraction=2.0**-24,
        repeats=(learned(5.0, 4.0 + 1e-6), learned(5.0, 4.0 - 1e-6)),
    )


def evidence(*parities: Parity, of: Plan | None = None) -> Evidence:
    found = evidence_of(parities, of or plan())
    assert found is not None
    return found


def test_a_comparison_is_read_back_and_is_no_record_of_a_run(tmp_path: Path) -> None:
    path = write_parity(tmp_path, parity(5.0, 4.0))
    assert path.parent == tmp_path / "parity" / plan().asked
    assert read_parity(path) == parity(5.0, 4.0)
    assert list(record_files(str(tmp_path))) == []
    assert write_parity(tmp_path, parity(5.0, 4.0)) != path


def test_runs_of_different_lengths_are_no_comparison(tmp_path: Path) -> None:
    path = write_parity(tmp_path, parity(5.0, 4.0))
    path.write_text(path.read_text().replace("[5.0,4.000001]", "[5.0,4.0,3.0]"))
    with pytest.raises(RecordError, match="3 losses and 2 gradient norms"):
        read_parity(path)


def test_the_newest_of_the_same_settings_is_found(tmp_path: Path) -> None:
    older, newer = parity(5.0, 4.0), parity(5.0, 4.5, second=1)
    for one in (newer, older):
        write_parity(tmp_path, one)
    found = read_parities(tmp_path, models=["mixtral_8x7b", "deepseek_v3"])
    assert found == (newer, older)
    assert evidence(*found).comparisons == (newer,)
    assert evidence(*found, of=toy()).verdict == "differs"
    assert evidence_of(found, plan(name="deepseek_v3")) is None


@pytest.mark.parametrize(
    ("change", "is_covered"),
    [
        # what the toy does not show: its EP is 2 for both, and its dispatcher what runs without a GPU
        ("parallel.expert=4", True),
        ("dispatch.dispatcher=deepep", True),
        ("seq_len=8192", True),
        ("kernels.grouped_gemm=false", False),
        ("recompute.granularity=full", False),
        ("parallel.tensor=2", False),
        ("token_drop={capacity_factor: 1.0}", False),
        ("model.moe.top_k=1", False),
        ("model.rope.rope_theta=5000.0", False),
        ("optimizer.exp_avg_dtype=bf16", False),
        ("overlap.grad_reduce=false", False),
    ],
)
def test_a_change_that_the_toy_shows_takes_the_evidence_away(change: str, is_covered: bool) -> None:
    assert (evidence_of((parity(5.0, 4.0),), plan(change)) is not None) == is_covered


def test_what_no_toy_runs_stays_unproven() -> None:
    found = evidence(parity(5.0, 4.0), of=plan("precision=fp8_blockwise", "dispatch.dispatcher=deepep"))
    assert found.verdict == "partly"
    assert {"precision=fp8_blockwise", "dispatch.dispatcher=deepep"} <= set(found.unseen)
    assert "kernels.family=transformer_engine" in found.unseen
    assert not any(setting.startswith(("model.", "parallel.", "steps.")) for setting in found.unseen)


def test_a_toy_that_was_compared_itself_is_proven_in_full() -> None:
    found = evidence(parity(5.0, 4.0), of=toy())
    assert (found.verdict, found.unseen) == ("equal", ())


def test_what_was_compared_in_fp32_alone_leaves_the_precision_unproven() -> None:
    exact = fp32_plan(toy())
    found = evidence(parity(5.0, 4.0, variant=exact), of=toy())
    assert found.unseen == ("precision=bf16",)
    own = parity(5.0, 4.0)
    later = own.model_copy(update={"base": ParitySide(plan=own.base.plan, learned=learned(4.9, 4.25))})
    both = evidence(parity(5.0, 4.0, variant=exact), later, of=toy())
    assert found.precision_gaps == ()
    assert both.precision_gaps == pytest.approx((-0.1, 0.25))
    assert "bf16 itself is off fp32 by at most 2.5e-01 nats (step 2), by 2.5e-01" in evidence_line(
        both, toy()
    )
    assert [one.variant.plan.recipe.precision for one in both.comparisons] == ["fp32", "bf16"]
    assert both.unseen == ()


def test_what_was_not_held_against_the_plain_setting_proves_nothing() -> None:
    one = parity(5.0, 4.0)
    side = ParitySide(plan=toy(), learned=one.base.learned)
    assert evidence_of((one.model_copy(update={"base": side}),), plan()) is None


def test_what_is_equal_says_what_it_would_not_have_seen() -> None:
    equal = parity(5.0, 4.0 + 2e-5)
    assert equal.is_equal
    assert verdict_text(equal) == (
        "equal over 2 steps; less than 7.9e-06 of the loss and 9.5e-07 of the gradient norm would not be seen"
    )
    assert parity_json(equal, Path("file"))["is_equal"] is True


def test_what_differs_says_from_which_step_on() -> None:
    text = verdict_text(parity(5.0, 4.5))
    assert text.startswith("differs from step 2: loss 4.000000 and 4.500000, apart by 0.5 ")
    # a factor in the gradients, which Adam hides from the losses
    text = verdict_text(parity(5.0, 4.0, norms=(4.0, 4.0)))
    assert text.startswith("differs from step 1: gradient norm 2.000000 and 4.000000, apart by 2 ")


def test_a_recipe_states_its_evidence_or_that_it_has_none() -> None:
    assert evidence_line(None, plan()).startswith("unproven: ")
    assert "later tokens" in evidence_line(None, plan(name="olmoe_1b_7b_expert_choice"))
    line = evidence_line(evidence(parity(5.0, 4.0)), plan())
    assert line.startswith(
        "partly: with the plain setting at smoke scale (4 processes)\nbf16 equal over 2 steps; "
    )
    assert "unproven: kernels (family=transformer_engine, fusions.permute" in line
    assert [parity_mark(one) for one in (None, evidence(parity(5.0, 4.0)), evidence(parity(5.0, 4.5)))] == [
        "unproven",
        "partly",
        "differs",
    ]


KNOWN = [key for key in recipe_model_keys(LOADER.root) if LOADER.model(key).hf_model_type is not None]


@pytest.mark.parametrize("key", KNOWN)
def test_the_default_run_of_every_known_model_states_its_evidence(key: str) -> None:
    found = evidence_of(read_parities(data_root() / "results", models=[key]), plan(name=key))
    command = f"moe-bench parity --plain {key} --scale smoke --data PREFIX"
    assert found is not None, f"{key} learns by other settings than were compared: run `{command}`"
    assert found.verdict == "partly"
    assert [one.variant.plan.recipe.precision for one in found.comparisons] == ["fp32", "bf16"]
    assert not any(one.provenance.git.is_dirty for one in found.comparisons)


def test_settings_are_grouped_by_what_they_belong_to() -> None:
    settings = ("precision=mxfp8", "kernels.family=quack", "kernels.fusions.rope=True", "mcore.a=1")
    assert grouped(settings) == "precision=mxfp8, kernels (family=quack, fusions.rope), mcore (a=1)"


def test_the_tables_are_printed() -> None:
    console = Console(width=200, record=True)
    one = parity(5.0, 4.5)
    console.print(parity_view(one, Path("file")), evidence_view({NAME: evidence(one)}, {"other": "why"}))
    text = console.export_text()
    assert "norm of variant" in text
    assert "loss differs from step 2" in text
    assert "other: not compared: why" in text


@pytest.mark.parametrize("num_steps", [1, 12, 13, 500])
def test_a_table_shows_a_dozen_steps_and_the_one_that_differs(num_steps: int) -> None:
    losses = (4.0,) * num_steps
    wrong = (*losses[:-2], 9.0, *losses[-1:])[:num_steps]
    base, variant = (Learned(losses=one, grad_norms=()) for one in (losses, wrong))
    one = parity(5.0, 4.0).model_copy(
        update={
            "base": ParitySide(plan=plan(), learned=base),
            "variant": ParitySide(plan=plan(), learned=variant),
            "repeats": (base, base),
        }
    )
    shown = steps_shown(one)
    assert {0, num_steps - 1} <= set(shown)
    assert len(shown) <= 14
    step = one.curves[0].first_different_step
    assert step is None or step - 1 in shown


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    write_parity_plot((parity(5.0, 4.0), parity(5.0, 4.5)), tmp_path / "parity.svg")
    assert "mixtral_8x7b" in (tmp_path / "parity.svg").read_text()
