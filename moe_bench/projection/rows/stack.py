"""The software that a published row ran on, as far as its name and date tell: suite, engine and release."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from moe_bench.results.published import PublishedRow


class Engine(StrEnum):
    """What ran the training step."""

    MEGATRON = "megatron"
    """Megatron-Core, under whatever suite."""
    AUTOMODEL = "automodel"
    TORCHTITAN = "torchtitan"
    OTHER = "other"


class Suite(StrEnum):
    """Who configured and published the run; knobs that nobody prints are alike within one."""

    BRIDGE = "Megatron-Bridge"
    NEMO = "NeMo"
    """dgxc-benchmarking up to 25.08, on NeMo 24 and 2."""
    MODEL_ZOO = "Megatron-MoE-ModelZoo"
    FOLDING = "MoE Parallel Folding"
    MEGATRON_LM = "Megatron-LM"
    AUTOMODEL = "NeMo Automodel"
    TORCHTITAN = "torchtitan"
    OTHER = "other"


@dataclass(frozen=True, slots=True, order=True)
class Release:
    """A date of the calendar that orders releases; containers are named after it."""

    year: int
    month: int
    patch: int = 0

    def __str__(self) -> str:
        return f"{self.year}-{self.month:02d}" + (f".{self.patch}" if self.patch else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """The software of one row, and what it did that a recipe cannot say."""

    engine: Engine
    suite: Suite
    release: Release | None
    """Container or date; None where the row prints neither."""
    graphed_modules: tuple[str, ...] = ()
    """Modules in CUDA graphs as printed, with those that a recipe has no word for (`mamba`)."""
    pipeline_schedule: str | None = None
    """A schedule that a recipe cannot ask for, such as `zbv` or `dualpipe`."""

    def is_before(self, year: int, month: int) -> bool:
        """Whether the release is known and older than `year`-`month`."""
        return self.release is not None and self.release < Release(year, month)

    def is_bridge(self, year: int, month: int) -> bool:
        """Whether this is Megatron-Bridge of one container, such as 25.09."""
        release = self.release
        return (
            self.suite is Suite.BRIDGE
            and release is not None
            and (release.year, release.month) == (year, month)
        )


_SUITES: tuple[tuple[str, Suite], ...] = (
    ("Automodel", Suite.AUTOMODEL),
    ("torchtitan", Suite.TORCHTITAN),
    ("ModelZoo", Suite.MODEL_ZOO),
    ("Megatron-Core (2025-04)", Suite.FOLDING),
    ("Megatron-Bridge", Suite.BRIDGE),
    ("NeMo", Suite.NEMO),
    ("Megatron", Suite.MEGATRON_LM),
    ("MCore", Suite.MEGATRON_LM),
)
"""Words of the column `framework`; the first that stands in it decides."""
_ENGINES = {
    Suite.AUTOMODEL: Engine.AUTOMODEL,
    Suite.TORCHTITAN: Engine.TORCHTITAN,
    Suite.OTHER: Engine.OTHER,
}
_OTHER_ENGINES = ("Skywork",)
"""Names that hold `Megatron` and are forks of their own."""
_CONTAINER = re.compile(r"(?:nemo:|NeMo |\bv)(\d\d)\.(\d\d)(?:\.(\d+))?\b")
_DATE = re.compile(r"(20\d\d)(?:-(\d\d))?")


def stack_of(row: PublishedRow) -> Stack:
    """The software of `row`, from its columns `framework` and `version`."""
    suite = next((suite for word, suite in _SUITES if word in row.framework), Suite.OTHER)
    if row.method is not None:
        suite = Suite.FOLDING
    if any(word in row.framework for word in _OTHER_ENGINES):
        suite = Suite.OTHER
    is_known = row.pipeline_schedule in (None, "1f1b", "interleaved1f1b")
    return Stack(
        engine=_ENGINES.get(suite, Engine.MEGATRON),
        suite=suite,
        release=release_in(row.version or ""),
        graphed_modules=row.cuda_graph_modules or (),
        pipeline_schedule=None if is_known else row.pipeline_schedule,
    )


def release_in(version: str) -> Release | None:
    """The release that a version text names: a container of NVIDIA (`26.04`, `v25.05.05`), else a date.

    A bare year counts as its middle.
    """
    container = _CONTAINER.search(version)
    if container is not None:
        return Release(2000 + int(container[1]), int(container[2]), int(container[3] or 0))
    date = _DATE.search(version)
    return None if date is None else Release(int(date[1]), int(date[2] or 6))
