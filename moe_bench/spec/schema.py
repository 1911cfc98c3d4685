"""The JSON schema of a recipe file, which editors use to complete keys and to mark mistakes."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

from pydantic import BaseModel

from moe_bench.spec.recipe import Recipe

SCHEMA_URI = "https://json-schema.org/draft/2020-12/schema"


def recipe_file_schema() -> dict[str, Any]:
    """Schema of a run recipe: `model` and `system` are names there, and every field says what it means."""
    schema = Recipe.model_json_schema()
    for owner in _models_below(Recipe):
        target = schema if owner is Recipe else schema["$defs"].get(owner.__name__)
        for name, text in attribute_docstrings(owner).items():
            if target is not None and name in target["properties"]:
                target["properties"][name]["description"] = text
    schema["properties"]["model"] = {"type": "string", "description": "A folder under recipes/."}
    schema["properties"]["system"] = {"type": "string", "description": "A file under recipes/systems/."}
    schema["required"] = [name for name in schema["required"] if name != "num_mtp_layers"]
    schema["$defs"] = {
        name: body for name, body in schema["$defs"].items() if f"#/$defs/{name}" in _references(schema)
    }
    return {"$schema": SCHEMA_URI, "title": "moe_bench recipe", **schema}


def attribute_docstrings(owner: type) -> dict[str, str]:
    """The string that follows each field in the source of a class, by field."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
    found: dict[str, str] = {}
    if isinstance(tree, ast.ClassDef):
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
                found[field.target.id] = " ".join(str(ast.literal_eval(below.value)).split())  # type: ignore[attr-defined]
    return found


def _models_below(owner: type[BaseModel]) -> list[type[BaseModel]]:
    """`owner` and every model that its fields mention, each once."""
    found: list[type[BaseModel]] = []
    pending: list[Any] = [owner]
    while pending:
        annotation = pending.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            if annotation not in found:
                found.append(annotation)
                pending += [field.annotation for field in annotation.model_fields.values()]
        else:
            pending += getattr(annotation, "__args__", ())
    return found


def _references(schema: dict[str, Any]) -> set[str]:
    """Every `$ref` that is reachable from the top of `schema`."""
    found: set[str] = set()
    pending: list[Any] = [schema["properties"]]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            reference = node.get("$ref")
            if reference is not None and reference not in found:
                found.add(reference)
                pending.append(schema["$defs"][reference.rpartition("/")[2]])
            pending += node.values()
        elif isinstance(node, list):
            pending += node
    return found
