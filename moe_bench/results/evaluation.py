"""What a checkpoint is worth on a dataset, and what it went on to say: results that are printed, not kept."""

from __future__ import annotations

import math
from typing import Literal

from moe_bench.spec.base import NonNegativeFloat, NonNegativeInt, PositiveInt, Spec, Text

Part = Literal["all", "held_out"]
"""Documents of a dataset: all of them, or those at its end that a run was not trained on."""


class Evaluation(Spec):
    """Loss of a model on a part of a dataset."""

    recipe: Text
    """As it ran."""
    checkpoint: Text
    num_steps: NonNegativeInt
    """Steps that the weights have taken; 0 where they were converted."""
    data: Text
    part: Part
    num_documents: PositiveInt
    num_tokens: PositiveInt
    """Tokens that were predicted: each of the part but the first, once."""
    loss: NonNegativeFloat
    """Mean cross entropy per token, in nats."""

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(self.loss)


class Generation(Spec):
    """How a model went on with a text."""

    recipe: Text
    checkpoint: Text
    num_steps: NonNegativeInt
    prompt: Text
    text: str
    """What follows the prompt."""
    tokens: tuple[NonNegativeInt, ...]
    """The same as token ids, without an end of document."""
    has_ended: bool
    """Whether the model ended the document itself."""
