"""Whether a rank fits its GPU, as far as the closed form can say."""

from __future__ import annotations

from enum import StrEnum

from moe_bench.analysis.memory import MemoryFit, RankMemory, needed_bytes


class MemoryVerdict(StrEnum):
    """What point and upper bound say beside the usable memory."""

    FITS = "fits"
    DOES_NOT_FIT = "does not fit"
    TOO_CLOSE = "too close to say"
    """What must be held fits, and would not with the margins for fragmentation, context and NCCL."""


def verdict(fit: MemoryFit) -> MemoryVerdict:
    """Of the fullest pipeline rank."""
    return rank_verdict(fit.worst, fit.usable_bytes)


def rank_verdict(rank: RankMemory, usable_bytes: int) -> MemoryVerdict:
    """Of one pipeline rank."""
    return bounds_verdict(rank.total_bytes, needed_bytes(rank), usable_bytes)


def bounds_verdict(held_bytes: int, needed_bytes: int, usable_bytes: int) -> MemoryVerdict:
    """Of what is held at the least, and what is needed with margins, beside what the GPU gives."""
    if needed_bytes <= usable_bytes:
        return MemoryVerdict.FITS
    return MemoryVerdict.TOO_CLOSE if held_bytes <= usable_bytes else MemoryVerdict.DOES_NOT_FIT
