"""A routing matrix from a file: for each sender, the tokens of one micro batch that go to each expert."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from moe_bench.errors import BadInputError
from moe_bench.spec.base import NonNegativeInt

Counts = tuple[tuple[NonNegativeInt, ...], ...]
"""One row per rank of the ETP x EP group, one count per expert."""


def read_counts(path: Path) -> Counts:
    """The matrix in a JSON file, a list of lists. Raises BadInputError for anything else."""
    try:
        return TypeAdapter(Counts).validate_json(path.read_bytes())
    except OSError as error:
        raise BadInputError(f"{path}: {error.strerror}; name a JSON file") from error
    except (ValidationError, json.JSONDecodeError) as error:
        raise BadInputError(
            f"{path}: not a matrix of counts; write a JSON list with one list of whole numbers per sender"
        ) from error
