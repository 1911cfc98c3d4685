"""A model's size under every way of counting in use, beside the size its authors publish."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from moe_bench.analysis.params import (
    Part,
    PartWeights,
    main_weights,
    mtp_weights,
    num_active_experts,
    sum_parts,
)
from moe_bench.spec.model import ModelSpec


class Counting(StrEnum):
    """What a parameter count includes; publishers differ and seldom say."""

    WITH_MTP = "with MTP modules"
    WITHOUT_MTP = "without MTP modules"
    WITHOUT_INPUT_EMBEDDING = "without MTP modules and input embedding"
    WITHOUT_EMBEDDINGS = "without MTP modules, input embedding and LM head"


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedSize:
    """Parameters by part and by way of counting, and what the authors state."""

    total_by_part: Mapping[Part, int]
    """The model without MTP modules."""
    active_by_part: Mapping[Part, int]
    mtp_total: int
    """All MTP modules of the published model."""
    mtp_active: int
    total: Mapping[Counting, int]
    active: Mapping[Counting, int]
    published_total: int
    published_active: int | None
    """None where no source prints them."""

    @property
    def nearest_total(self) -> Counting:
        """The way of counting whose total comes nearest to the published one."""
        return _nearest(self.total, self.published_total)

    @property
    def nearest_active(self) -> Counting:
        """The way of counting whose active parameters come nearest to the published ones.

        Where none are published, that of the nearest total.
        """
        if self.published_active is None:
            return self.nearest_total
        return _nearest(self.active, self.published_active)


def counted_size(model: ModelSpec) -> CountedSize:
    """Total and active parameters of `model`, part by part and under every way of counting.

    Active parameters are those that one token passes: of the routed experts, `top_k` per expert layer.
    """
    total, mtp_total = _counted(model, num_experts=None)
    active_params = model.published.active_params
    active, mtp_active = _counted(model, num_experts=num_active_experts(model))
    return CountedSize(
        total_by_part=total,
        active_by_part=active,
        mtp_total=mtp_total,
        mtp_active=mtp_active,
        total=_by_counting(model, total, mtp_total),
        active=_by_counting(model, active, mtp_active),
        published_total=round(model.published.total_params),
        published_active=None if active_params is None else round(active_params),
    )


def _counted(model: ModelSpec, *, num_experts: int | None) -> tuple[dict[Part, int], int]:
    # as published, whatever kernels build it
    num_modules = model.num_mtp_modules(model.num_mtp_layers)
    mtp = sum_parts([mtp_weights(model, num_experts=num_experts, family=None)] * num_modules)
    main = main_weights(model, num_experts=num_experts, family=None)
    return _totals(main), sum(_totals(mtp).values())


def _totals(parts: PartWeights) -> dict[Part, int]:
    return {part: weights.total for part, weights in parts.items()}


def _by_counting(model: ModelSpec, parts: Mapping[Part, int], mtp: int) -> dict[Counting, int]:
    main = sum(parts.values())
    embedding = parts[Part.INPUT_EMBEDDING]
    # a tied matrix is embedding and head at once: leaving out the input embedding leaves it in as the head
    without_input = main if model.tied_embeddings else main - embedding
    return {
        Counting.WITH_MTP: main + mtp,
        Counting.WITHOUT_MTP: main,
        Counting.WITHOUT_INPUT_EMBEDDING: without_input,
        Counting.WITHOUT_EMBEDDINGS: without_input - embedding,
    }


def _nearest(counts: Mapping[Counting, int], published: int) -> Counting:
    return min(_PREFERENCE, key=lambda counting: abs(counts[counting] - published))


_PREFERENCE = (
    Counting.WITHOUT_MTP,
    Counting.WITHOUT_INPUT_EMBEDDING,
    Counting.WITHOUT_EMBEDDINGS,
    Counting.WITH_MTP,
)
"""Order in which equal distances are resolved: a model without MTP modules has two equal counts."""
