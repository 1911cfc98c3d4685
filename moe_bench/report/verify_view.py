"""A proof as people read it: errors by layout, the worst tensor, the verdict, and what was compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe_bench.results.verification import (
    GRADIENT_TOLERANCE_FRACTION,
    LOGIT_TOLERANCE_FRACTION,
    LayoutProof,
    Verification,
)

MAX_SUSPECTS = 6
"""Tensors that a difference names."""


def verifications_view(found: Mapping[Path, Verification]) -> RenderableType:
    """One line per model and layout, then what was compared and where the records lie."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("model", "layout", "logits", "gradients", "worst gradient", "loss", "verdict"):
        right = heading in ("logits", "gradients", "loss")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for verification in found.values():
        for proof in verification.proofs:
            table.add_row(verification.model.key, *_row(proof))
    packages = next(iter(found.values())).provenance.packages
    notes = [
        f"largest errors: logits over their standard deviation (at most {LOGIT_TOLERANCE_FRACTION:g}), "
        f"gradients over the tensor's largest (at most {GRADIENT_TOLERANCE_FRACTION:g})",
        f"toys of the models' structure, FP32 on CPU: megatron-core {packages['megatron-core']}, "
        f"transformers {packages['transformers']}, torch {packages['torch']}",
        *(
            f"{verification.model.key} departs from its class: {departure}"
            for verification in found.values()
            for departure in verification.departures
        ),
        *(f"written to {path}" for path in found),
    ]
    return Group(table, *(Text(note) for note in notes))


def _row(proof: LayoutProof) -> tuple[str, ...]:
    worst = proof.worst_gradient
    return (
        proof.layout,
        f"{proof.logit_error_fraction:.1e}",
        f"{worst.error_fraction:.1e}",
        worst.tensor,
        f"{proof.loss:.6f}",
        "equal" if proof.is_equal else "NOT EQUAL",
    )


def verifications_json(found: Mapping[Path, Verification]) -> list[dict[str, object]]:
    """The records themselves, with the verdict."""
    return [
        {"path": str(path), "is_proven": verification.is_proven, **verification.model_dump(mode="json")}
        for path, verification in found.items()
    ]


def difference(verification: Verification) -> str:
    """Of a model that is not equal, where to look: the first layout, part and tensors that differ."""
    proof = next(proof for proof in verification.proofs if not proof.is_equal)
    worst = ", ".join(f"{error.tensor} {error.error_fraction:.1e}" for error in proof.suspects[:MAX_SUSPECTS])
    model = verification.model
    return (
        f"{model.key}: not Hugging Face's {model.hf_model_type} under {proof.layout}: first differs in "
        f"{proof.first_difference or 'the logits'}; look at the rules of {worst}"
    )


def evidence_line(verification: Verification | None) -> str:
    """What `show` says of the last proof of a model as it is."""
    if verification is None:
        return "not verified against Hugging Face in this state: moe-bench verify"
    worst_logit = max(proof.logit_error_fraction for proof in verification.proofs)
    worst_gradient = max(proof.worst_gradient.error_fraction for proof in verification.proofs)
    layouts = ", ".join(proof.layout for proof in verification.proofs)
    verdict = "equal to" if verification.is_proven else "NOT EQUAL to"
    return (
        f"{verdict} Hugging Face's {verification.model.hf_model_type}: logits {worst_logit:.1e}, gradients "
        f"{worst_gradient:.1e} ({layouts}; {verification.provenance.started_at[:10]})"
    )
