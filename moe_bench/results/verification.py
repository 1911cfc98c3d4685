"""The proof that a model is Hugging Face's: errors of one step on the same weights, by layout, written once.

A file holds one recipe's model, `results/verify/<model>/<start>-<commit>-<job>.json`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from moe_bench.results.journal import file_stem
from moe_bench.results.record import GitState
from moe_bench.results.store import VERIFY_FOLDER, write_once
from moe_bench.results.versioned import read_versioned
from moe_bench.spec.base import NonNegativeFloat, PositiveInt, Spec, Text
from moe_bench.spec.derive_verify import VerifyLayout
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.scale import Substitution

SCHEMA_VERSION = 1
LOGIT_TOLERANCE_FRACTION = 1e-4
GRADIENT_TOLERANCE_FRACTION = 1e-3
"""FP32 sums in another order give 1e-6 to 1e-5; a wrong factor, mask or map gives 1e-2 and more."""


class TensorError(Spec):
    """How far one tensor is off."""

    tensor: Text
    error_fraction: NonNegativeFloat


class LayoutProof(Spec):
    """One step of both models, Megatron-Core's under one layout."""

    layout: VerifyLayout
    num_processes: PositiveInt
    logit_error_fraction: NonNegativeFloat
    """Largest difference of any logit over the standard deviation of all; prediction modules included."""
    outputs: tuple[TensorError, ...]
    """Of what leaves the embedding and every layer's attention and MLP, forward through the model: largest
    difference over the standard deviation."""
    loss: float
    reference_loss: float
    gradients: tuple[TensorError, ...] = Field(min_length=1)
    """Of every parameter, by its key in Megatron-Core's checkpoint, worst rank: largest difference over the
    tensor's largest gradient."""

    @property
    def worst_gradient(self) -> TensorError:
        """The one that is furthest off."""
        return max(self.gradients, key=lambda error: error.error_fraction)

    @property
    def first_difference(self) -> str | None:
        """The first part, forward through the model, whose output differs; None where only logits do."""
        return next((o.tensor for o in self.outputs if o.error_fraction > LOGIT_TOLERANCE_FRACTION), None)

    @property
    def suspects(self) -> tuple[TensorError, ...]:
        """Gradients to look at first, worst first: of `first_difference`, else of the whole model."""
        place = self.first_difference
        own = [error for error in self.gradients if place is None or _is_part_of(place, error.tensor)]
        return tuple(sorted(own, key=lambda error: -error.error_fraction))

    @property
    def is_equal(self) -> bool:
        """Whether all errors are within the tolerances; an error that is not a number is not."""
        return self.logit_error_fraction <= LOGIT_TOLERANCE_FRACTION and all(
            error.error_fraction <= GRADIENT_TOLERANCE_FRACTION for error in self.gradients
        )


def _is_part_of(place: str, tensor: str) -> bool:
    """Whether a parameter belongs to the part of a model whose output is kept under `place`."""
    layer, _, part = place.rpartition(".")
    norm = {"self_attention": "input_layernorm", "mlp": "pre_mlp_layernorm"}.get(part)
    return tensor.startswith(f"{place}.") or (norm is not None and tensor.startswith(f"{layer}.{norm}."))


class VerificationProvenance(Spec):
    """Where, when and with what a proof was made."""

    started_at: Text
    """UTC, ISO 8601."""
    command: tuple[str, ...]
    job_id: Text
    git: GitState
    python_version: Text
    packages: dict[str, str]
    host: Text
    cpu_model: str | None
    os: Text


class Verification(Spec):
    """One recipe's model, proven or not."""

    schema_version: Literal[1] = 1
    provenance: VerificationProvenance
    asked: Text
    """Name of the recipe."""
    model: ModelSpec
    """As asked; a proof says nothing about a model file that has changed since."""
    substitutions: tuple[Substitution, ...]
    """In what the toy that was compared is not the recipe."""
    departures: tuple[Text, ...]
    """In what Hugging Face's toy is not what its class would build from the model's config."""
    proofs: tuple[LayoutProof, ...] = Field(min_length=1)

    @property
    def is_proven(self) -> bool:
        """Whether the two models are equal under every layout."""
        return all(proof.is_equal for proof in self.proofs)


def write_verification(root: Path, verification: Verification) -> Path:
    """Write it to a new file of its own and return the path."""
    where = verification.provenance
    stem = file_stem(started_at=where.started_at, commit=where.git.short_name, job_id=where.job_id)
    return write_once(root / VERIFY_FOLDER / verification.model.key / f"{stem}.json", verification)


def read_verification(path: Path) -> Verification:
    """The proof in `path`; RecordError names the file, the field and what is wrong with it."""
    return read_versioned(path, Verification, what="verification file", version=SCHEMA_VERSION)


def latest_verification(root: Path, model: ModelSpec) -> Verification | None:
    """The newest proof of `model` exactly as it is; None where there is none, or of another state of it."""
    return next((one for one in _newest_first(root / VERIFY_FOLDER / model.key) if one.model == model), None)


def _newest_first(folder: Path) -> Iterator[Verification]:
    for path in sorted(folder.glob("[!.]*.json"), reverse=True):
        yield read_verification(path)
