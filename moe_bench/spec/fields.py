"""Names of a recipe's fields: every dotted one, and the one that a single word stands for."""

from __future__ import annotations

import typing
from collections.abc import Iterator

from pydantic import BaseModel

from moe_bench.errors import BadInputError
from moe_bench.spec.load import UnknownNameError
from moe_bench.spec.recipe import Recipe


def recipe_fields() -> tuple[str, ...]:
    """Every field that can be set, by its dotted name; those of model and system included."""
    return tuple(dict.fromkeys(_fields(Recipe, "")))


def field_path(name: str) -> str:
    """The dotted name that `name` stands for: itself, or the one field whose last word it is.

    Raises UnknownNameError with the nearest names, or BadInputError where several fields end in it.
    """
    fields = recipe_fields()
    # env and mcore are open: any key may stand below them
    if name in fields or name.partition(".")[0] in ("env", "mcore"):
        return name
    ending = [field for field in fields if field.endswith(f".{name}")]
    if len(ending) > 1:
        raise BadInputError(f"{name} may mean {' or '.join(ending)}; write it in full")
    if not ending:
        raise UnknownNameError("field", name, [*fields, *(field.rpartition(".")[2] for field in fields)])
    return ending[0]


def full_change(change: str) -> str:
    """`FIELD=VALUE` with the dotted name of its field; raises as `field_path`."""
    name, equals, value = change.partition("=")
    return f"{field_path(name)}{equals}{value}"


def _fields(owner: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in owner.model_fields.items():
        yield prefix + name
        for below in _models(field.annotation):
            yield from _fields(below, f"{prefix}{name}.")


def _models(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _models(argument)
