"""A schema violation in our own words: the key, what is wrong with it, and what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from moe_bench.spec.base import Spec
from moe_bench.spec.problem import Problem
from moe_bench.spec.yaml_tree import Node, Path_

_MISSING = "missing"
_UNKNOWN = "unknown key"
_REFERENCES = {("model",): "a folder under recipes/", ("system",): "a file under recipes/systems/"}


def explain(tree: Node, kind: type[Spec], errors: Sequence[ErrorDetails]) -> Iterator[Problem]:
    """Pydantic's errors about `tree`, read as a `kind`; a misspelt key is not also called missing."""
    problems = [_explain_one(tree, kind, error) for error in errors]
    meant = {problem.fix for problem in problems if problem.problem == _UNKNOWN}
    for problem in problems:
        if problem.problem != _MISSING or f"did you mean {str(problem.path[-1])!r}?" not in meant:
            yield problem


def _explain_one(tree: Node, kind: type[Spec], error: ErrorDetails) -> Problem:
    path = _without_tags(tree, error["loc"])
    node = tree.nearest(path)
    if error["type"] == "missing":
        return Problem(path, _MISSING, f"add `{path[-1]}: ...`")
    if error["type"] == "extra_forbidden":
        return Problem(path, _UNKNOWN, _nearest_field(kind, path))
    if path in _REFERENCES and not isinstance(node.value, dict):
        return Problem(path, f"{node.text} is no name", f"write {_REFERENCES[path]}")
    if error["type"] in ("literal_error", "union_tag_invalid"):
        context = error["ctx"]
        if "discriminator" in context:
            path = (*path, str(context["discriminator"]).strip("'"))
            node = tree.nearest(path)
        expected = str(context.get("expected") or context.get("expected_tags")).replace("'", "")
        return Problem(path, f"{_typed(node)} is not known", f"write one of {expected}")
    return _wrong_type(path, node, error)


def _wrong_type(path: Path_, node: Node, error: ErrorDetails) -> Problem:
    kind_read = type(node.value).__name__
    if error["type"] == "string_type" and isinstance(node.value, int | float):
        return Problem(
            path, f"YAML reads {node.text} as {kind_read}, text is expected", f'quote it: "{node.text}"'
        )
    if error["type"] in ("float_type", "int_type") and _is_number(node.text):
        number = float(node.text)
        fix = _float_text(number) if error["type"] == "float_type" else f"{number:.0f}"
        return Problem(path, f"YAML reads {node.text} as {kind_read}", f"write {fix}")
    said = error["msg"].replace("Input should be", "it must be").replace("String should", "it should")
    # JSON's words for what YAML calls a mapping and a list
    said = said.replace("it must be an object", "it must be a mapping, `key: value` lines below it")
    said = said.replace("it must be a valid array", "it must be a list, `- value` lines below it")
    return Problem(path, f"is {_typed(node)}", said)


def _float_text(number: float) -> str:
    """As YAML 1.1 reads a float: with a point and a signed exponent, and all digits."""
    return next(text for digits in range(1, 18) if float(text := f"{number:.{digits}e}") == number)


def _typed(node: Node) -> str:
    """A value as the user typed it, or the kind of a collection."""
    if isinstance(node.value, dict):
        return "a mapping"
    return "a list" if isinstance(node.value, list) else node.text or "empty"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _without_tags(tree: Node, path: Path_) -> Path_:
    """The path of an error without the union tags that pydantic puts into it."""
    kept: list[str | int] = []
    for index, element in enumerate(path):
        is_last = index == len(path) - 1
        parent = tree.nearest(tuple(kept))
        known = (isinstance(parent.value, dict) and element in parent.value) or isinstance(element, int)
        if known or is_last:
            kept.append(element)
    return tuple(kept)


def _nearest_field(kind: type[Spec], path: Path_) -> str:
    """Advice for an unknown key: the field of its mapping with the nearest name."""
    models = _models([kind])
    for element in path[:-1]:
        if isinstance(element, str):
            models = _models(
                [model.model_fields[element].annotation for model in models if element in model.model_fields]
            )
    known = sorted({name for model in models for name in model.model_fields})
    nearest = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
    return f"did you mean {nearest[0]!r}?" if nearest else f"known here: {', '.join(known)}"


def _models(annotations: Sequence[object]) -> list[type[BaseModel]]:
    """The pydantic models inside annotations such as `tuple[A, ...]`, `A | None`, `Annotated[A | B, x]`."""
    found: list[type[BaseModel]] = []
    for annotation in annotations:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.append(annotation)
        else:
            found += _models(get_args(annotation))
    return found
