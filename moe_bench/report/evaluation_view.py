"""Evaluations and generated text as people read them."""

from __future__ import annotations

from rich.console import RenderableType
from rich.text import Text

from moe_bench.report.columns import Columns
from moe_bench.results.evaluation import Evaluation, Generation


def evaluation_view(found: Evaluation) -> RenderableType:
    """One row: loss and perplexity, and of what."""
    row = {
        "recipe": found.recipe,
        "steps": str(found.num_steps),
        "data": found.data,
        "part": "held out" if found.part == "held_out" else "all",
        "documents": f"{found.num_documents:,}",
        "tokens": f"{found.num_tokens:,}",
        "loss": f"{found.loss:.4f}",
        "perplexity": f"{found.perplexity:.2f}",
    }
    return Columns(
        headings=tuple(row),
        rows=(tuple(row.values()),),
        right=frozenset({"steps", "documents", "tokens", "loss", "perplexity"}),
    )


def evaluation_json(found: Evaluation) -> dict[str, object]:
    """`evaluation_view` as JSON; loss in nats per token."""
    return found.model_dump(mode="json") | {"perplexity": found.perplexity}


def generation_view(found: Generation) -> RenderableType:
    """The prompt and what follows it, and nothing else: it can be piped."""
    return Text(found.prompt + found.text)


def generation_json(found: Generation) -> dict[str, object]:
    """With token ids and whether the model ended the text."""
    return found.model_dump(mode="json")
