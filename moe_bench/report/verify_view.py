"""A proof as people read it: errors by layout, the worst tensor, the verdict, and what was compared."""

from __future__ import annotations

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


def verification_view(verification: Verification, path: Path) -> RenderableType:
    """One line per layout, then what the toy departs in and where the record lies."""
    model = verification.model
    title = f"{verification.asked}: {model.display_name} beside Hugging Face's {model.hf_model_type}"
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    headings = ("layout", "processes", "logits", "gradients", "worst gradient", "loss", "verdict")
    for heading in headings:
        right = heading in ("processes", "logits", "gradients", "loss")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for proof in verification.proofs:
        table.add_row(*_row(proof))
    packages = verification.provenance.packages
    notes = [
        f"largest errors, logits of their standard deviation (at most {LOGIT_TOLERANCE_FRACTION:g}), "
        f"gradients of the tensor's largest (at most {GRADIENT_TOLERANCE_FRACTION:g}); FP32, CPU, toy of "
        f"{model.key}'s structure",
        f"megatron-core {packages['megatron-core']}, transformers {packages['transformers']}, "
        f"torch {packages['torch']}",
        *(f"departs from the class: {departure}" for departure in verification.departures),
        f"written to {path}",
    ]
    return Group(table, *(Text(note) for note in notes))


def _row(proof: LayoutProof) -> tuple[str, ...]:
    worst = proof.worst_gradient
    return (
        proof.layout,
        str(proof.num_processes),
        f"{proof.logit_error_fraction:.1e}",
        f"{worst.error_fraction:.1e}",
        worst.tensor,
        f"{proof.loss:.6f}",
        "equal" if proof.is_equal else "NOT EQUAL",
    )


def verification_json(verification: Verification, path: Path) -> dict[str, object]:
    """The record itself, with what is derived from it."""
    return {
        "path": str(path),
        "is_proven": verification.is_proven,
        **verification.model_dump(mode="json"),
    }


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
