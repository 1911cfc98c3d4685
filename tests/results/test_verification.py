"""Proofs on disk: written once, found again for the model as it is, and what they say of a difference."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moe_bench.cli import main
from moe_bench.report.verify_view import evidence_line, verifications_json
from moe_bench.results.record import GitState
from moe_bench.results.store import record_files
from moe_bench.results.verification import (
    LayoutProof,
    TensorError,
    Verification,
    VerificationProvenance,
    latest_verification,
    read_verification,
    write_verification,
)
from moe_bench.spec.catalogue import data_root, recipes_root
from moe_bench.spec.derive_verify import LAYOUTS
from moe_bench.spec.load import Loader

LAYER = "decoder.layers.1"


def proof(*, logits: float, attention: float, mlp: float) -> LayoutProof:
    return LayoutProof(
        layout="TP2 x EP2",
        num_processes=2,
        logit_error_fraction=logits,
        outputs=(
            TensorError(tensor="embedding", error_fraction=0.0),
            TensorError(tensor=f"{LAYER}.self_attention", error_fraction=attention),
            TensorError(tensor=f"{LAYER}.mlp", error_fraction=mlp),
        ),
        loss=5.0,
        reference_loss=5.0,
        gradients=(
            TensorError(tensor="output_layer.weight", error_fraction=0.9 * (logits > 1e-4)),
            TensorError(tensor=f"{LAYER}.input_layernorm.weight", error_fraction=attention),
            TensorError(tensor=f"{LAYER}.self_attention.linear_proj.weight", error_fraction=attention / 2),
            TensorError(tensor=f"{LAYER}.pre_mlp_layernorm.weight", error_fraction=mlp / 2),
            TensorError(tensor=f"{LAYER}.mlp.router.weight", error_fraction=mlp),
        ),
    )


def verification(found: LayoutProof, *, second: int = 0) -> Verification:
    return Verification(
        provenance=VerificationProvenance(
            started_at=f"2026-11-22T12:00:0{second}+00:00",
            command=("moe-bench", "verify", "mixtral_8x7b"),
            job_id="pid1",
            git=GitState(commit="0123456789", branch="main", is_dirty=False),
            python_version="3.12.1",
            packages={"megatron-core": "0.19.2", "transformers": "5.23.0", "torch": "2.15.0"},
            host="node",
            cpu_model=None,
            os="Linux",
        ),
        asked="mixtral_8x7b/h100_sxm_64g_bf16",
        model=Loader(root=recipes_root()).model("mixtral_8x7b"),
        substitutions=(),
        departures=(),
        proofs=(found,),
    )


EQUAL = proof(logits=2e-6, attention=1e-6, mlp=3e-6)
WRONG = proof(logits=0.5, attention=1e-6, mlp=0.3)


def test_small_errors_are_equal_and_large_ones_are_not() -> None:
    assert EQUAL.is_equal
    assert not WRONG.is_equal
    assert not proof(logits=2e-6, attention=2e-3, mlp=0.0).is_equal
    assert not proof(logits=2e-4, attention=0.0, mlp=0.0).is_equal


def test_suspects_are_gradients_of_the_first_part_that_differs() -> None:
    assert WRONG.first_difference == f"{LAYER}.mlp"
    assert [error.tensor for error in WRONG.suspects] == [
        f"{LAYER}.mlp.router.weight",
        f"{LAYER}.pre_mlp_layernorm.weight",
    ]
    only_logits = proof(logits=0.5, attention=0.0, mlp=0.0)
    assert only_logits.first_difference is None
    assert only_logits.suspects[0].tensor == "output_layer.weight"
    early = proof(logits=0.5, attention=0.2, mlp=0.3)
    assert early.suspects[0].tensor == f"{LAYER}.input_layernorm.weight"


def test_proofs_are_written_once_and_are_no_runs(tmp_path: Path) -> None:
    first = write_verification(tmp_path, verification(EQUAL))
    second = write_verification(tmp_path, verification(EQUAL))
    assert first.name == "20261122T120000Z-01234567-pid1.json"
    assert first != second
    assert read_verification(first) == verification(EQUAL)
    assert list(record_files(str(tmp_path))) == []


def test_the_newest_proof_of_the_model_as_it_is_counts(tmp_path: Path) -> None:
    write_verification(tmp_path, verification(EQUAL, second=1))
    newest = verification(WRONG, second=2)
    write_verification(tmp_path, newest)
    assert latest_verification(tmp_path, newest.model) == newest
    changed = newest.model.model_copy(update={"norm_epsilon": 1e-6})
    assert latest_verification(tmp_path, changed) is None


def test_what_show_says_of_a_proof() -> None:
    assert evidence_line(verification(EQUAL)) == (
        "equal to Hugging Face's mixtral: logits 2.0e-06, gradients 3.0e-06 (TP2 x EP2; 2026-11-22)"
    )
    assert evidence_line(verification(WRONG)).startswith("NOT EQUAL")
    assert "moe-bench verify" in evidence_line(None)


class Stub:
    """Stands in for the harness module, whose forks a test process cannot make."""

    def __init__(self, found: Verification) -> None:
        self.found = found

    def verify(self, recipe: object, **more: object) -> Verification:
        return self.found


@pytest.mark.parametrize(("found", "code"), [(EQUAL, 0), (WRONG, 1)])
def test_the_verb_prints_records_and_ends_with_the_verdict(
    found: LayoutProof,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "moe_bench.harness.convert.verify", Stub(verification(found)))
    assert main(["verify", "mixtral_8x7b", "--out", str(tmp_path)]) == code
    printed = capsys.readouterr()
    assert ("NOT EQUAL" in printed.out) == bool(code)
    assert (f"first differs in {LAYER}.mlp; look at the rules of {LAYER}.mlp.router" in printed.err) == bool(
        code
    )
    (path,) = (tmp_path / "verify" / "mixtral_8x7b").glob("*.json")
    (shown,) = verifications_json({path: read_verification(path)})
    assert shown["is_proven"] is (code == 0)


def test_without_transformers_the_verb_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("moe_bench.harness.start.importlib.util.find_spec", lambda name: None)
    assert main(["verify", "mixtral_8x7b"]) == 3
    assert "pip install 'moe_bench[huggingface]'" in capsys.readouterr().err


def test_a_model_without_a_map_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", "mixtral_8x7b", "--set", "model.hf_model_type=llama"]) == 2
    assert "hf_model_type" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--all", "mixtral_8x7b"]])
def test_models_are_named_or_all_of_them_meant(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", *arguments]) == 2
    assert "name some, or --all" in capsys.readouterr().err


SHIPPED = sorted(
    path.parent.name
    for path in recipes_root().glob("*/model.yaml")
    if Loader(root=recipes_root()).model(path.parent.name).hf_model_type is not None
)
"""Those that Hugging Face has; the others are there for a router that nobody has published weights with."""


@pytest.mark.parametrize("key", SHIPPED)
def test_every_shipped_model_of_hugging_face_is_proven_as_it_is(key: str) -> None:
    found = latest_verification(data_root() / "results", Loader(root=recipes_root()).model(key))
    assert found is not None, f"{key} has changed since it was proven: run `moe-bench verify {key}`"
    assert found.is_proven
    assert [proof.layout for proof in found.proofs] == list(LAYOUTS)


def test_show_names_the_proof(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "olmoe_1b_7b"]) == 0
    assert "equal to Hugging Face's olmoe: logits" in capsys.readouterr().out
    assert main(["show", "olmoe_1b_7b", "--set", "model.norm_epsilon=1.0e-6"]) == 0
    assert "not verified against Hugging Face in this state" in capsys.readouterr().out
