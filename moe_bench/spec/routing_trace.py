"""A routing trace: tokens that each expert of each layer received, read from a file and dealt out again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from moe_bench.errors import BadInputError
from moe_bench.spec.base import NonNegativeInt

Trace = tuple[tuple[NonNegativeInt, ...], ...]
"""[layer][expert]"""
_TRACE: TypeAdapter[Trace] = TypeAdapter(Trace)


def read_trace(path: Path, *, option: str, choices: str) -> Trace:
    """The trace in a JSON file; `option` and its `choices` are named where there is none (BadInputError)."""
    try:
        return _TRACE.validate_json(path.read_bytes())
    except OSError as error:
        raise BadInputError(f"{option} {path}: {error.strerror}; write {choices}") from error
    except ValidationError as error:
        raise BadInputError(
            f"{option} {path}: not a routing trace; write a JSON list with a list of whole numbers per layer"
        ) from error


def dealt_counts(recorded: Sequence[int], *, num_tokens: int, top_k: int) -> tuple[int, ...]:
    """Tokens per expert when `num_tokens` tokens choose `top_k` experts each in recorded proportions.

    c_e = T k r_e / sum r, rounded by largest remainders so that they sum to T k; at most T, what is beyond
    goes to the experts with room in the order of their remainders. Raises ValueError for a recording without
    tokens, or with fewer than `top_k` experts.
    """
    total, num_choices = sum(recorded), num_tokens * top_k
    if not total or len(recorded) < top_k:
        raise ValueError(f"{total} recorded tokens over {len(recorded)} experts cannot be dealt to {top_k}")
    counts = [min(num_tokens, count * num_choices // total) for count in recorded]
    by_remainder = sorted(range(len(recorded)), key=lambda expert: -(recorded[expert] * num_choices % total))
    missing = num_choices - sum(counts)
    while missing:
        open_experts = [expert for expert in by_remainder if counts[expert] < num_tokens][:missing]
        for expert in open_experts:
            counts[expert] += 1
        missing -= len(open_experts)
    return tuple(counts)


def busiest_expert_rank(trace: Trace, *, num_ranks: int) -> int:
    """Expert-parallel rank whose experts receive most over all layers; experts stand on ranks in order."""
    per_rank = [0.0] * num_ranks
    for layer in trace:
        size = len(layer) // num_ranks
        for rank in range(num_ranks):
            per_rank[rank] += sum(layer[rank * size : (rank + 1) * size]) / max(1, sum(layer))
    return per_rank.index(max(per_rank))
