"""What the training engines behind published rows do differently, and which rows constants are fitted to."""

from __future__ import annotations

from collections.abc import Mapping

from moe_bench.projection.rows.inference import InferredRun
from moe_bench.projection.rows.stack import Engine
from moe_bench.projection.work.traits import AUTOMODEL, MEGATRON, TORCHTITAN, Traits
from moe_bench.results.published import PublishedRow

TRAITS: Mapping[Engine, Traits] = {
    Engine.MEGATRON: MEGATRON,
    Engine.AUTOMODEL: AUTOMODEL,
    Engine.TORCHTITAN: TORCHTITAN,
    Engine.OTHER: MEGATRON,
}
_TRUSTED = ("A", "B")


def traits_of(run: InferredRun) -> Traits:
    """How the engine of `run` runs a layer; an unknown one as Megatron-Core does."""
    return TRAITS[run.stack.engine]


def is_scored(row: PublishedRow) -> bool:
    """Whether the row counts for the accuracy: training for its speed, of a trust that it can carry."""
    return row.kind == "pretrain" and row.trust in _TRUSTED


def is_fitted(run: InferredRun) -> bool:
    """Whether constants are fitted to the row: it is scored, and Megatron-Core ran it."""
    return is_scored(run.row) and run.stack.engine is Engine.MEGATRON
