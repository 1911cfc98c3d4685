"""YAML read into a tree that remembers the file and line of every key, and refuses YAML's silent turns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from moe_bench.errors import Mistake, RecipeError

Scalar = str | int | float | bool | None
Path_ = tuple[str | int, ...]

_SYNTAX_FIXES = {
    "tab character": "indent with spaces",
    "mapping values are not allowed": "quote text with a colon in it, or mend the indentation",
    "did not find expected key": "close the quote or bracket before it, or mend the indentation",
    "found another document": "one file is one recipe: drop the line `---` and what follows",
    "found unexpected end of stream": "close the quote",
}
"""What to do about libyaml's complaints, by words of them."""

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True)
class Node:
    """A value of a YAML file with the place where it is written."""

    value: Scalar | dict[str, Node] | list[Node]
    file: str
    line: int
    text: str = ""
    """A scalar as typed, before YAML made a number of it."""

    def plain(self) -> object:
        """The value as Python's own dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def nearest(self, path: Path_) -> Node:
        """The deepest node on `path`; elements that the tree does not have are passed over."""
        node = self
        for element in path:
            if isinstance(node.value, dict) and element in node.value:
                node = node.value[str(element)]
            elif isinstance(node.value, list) and isinstance(element, int) and element < len(node.value):
                node = node.value[element]
        return node

    def with_child(self, key: str, child: Node) -> Node:
        """A copy of this mapping in which `key` is `child`."""
        mapping = self.value if isinstance(self.value, dict) else {}
        return replace(self, value={**mapping, key: child})

    def with_value_at(self, path: tuple[str, ...], leaf: Node) -> Node:
        """A copy in which the value at `path` is `leaf`; missing mappings on the way are made."""
        key, *rest = path
        if not rest:
            return self.with_child(key, leaf)
        child = self.value.get(key) if isinstance(self.value, dict) else None
        if child is None or not isinstance(child.value, dict):
            child = Node({}, leaf.file, leaf.line)
        return self.with_child(key, child.with_value_at(tuple(rest), leaf))


def read_yaml(path: Path, *, shown_as: str) -> Node:
    """The tree of the YAML mapping in `path`; RecipeError for what is no text, broken YAML, repeated keys."""
    return parse_yaml(_text_of(path, shown_as), shown_as=shown_as)


def read_yaml_list_or_mapping(path: Path, *, shown_as: str) -> Node:
    """As `read_yaml`, for a file that may hold a list."""
    return _parsed(_text_of(path, shown_as), (yaml.MappingNode, yaml.SequenceNode), shown_as=shown_as)


def parse_yaml(text: str, *, shown_as: str) -> Node:
    """As `read_yaml`, for text that is already here."""
    return _parsed(text, (yaml.MappingNode,), shown_as=shown_as)


def _text_of(path: Path, shown_as: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            (_whole_file(shown_as, f"cannot be read ({error.strerror})", "check the path"),)
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError((_whole_file(shown_as, "is not text", "write YAML in UTF-8"),)) from error


def _parsed(text: str, roots: tuple[type[yaml.Node], ...], *, shown_as: str) -> Node:
    mistakes: list[Mistake] = []
    try:
        root = yaml.compose(text, Loader=_LOADER)
        tree = None if root is None else _convert(root, shown_as, (), mistakes)
    except RecursionError as error:
        problem, fix = "is nested too deep, or holds itself by an alias", "write the value out"
        raise RecipeError((_whole_file(shown_as, problem, fix),)) from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        said = str(error.problem or error.context)
        fix = next((fix for words, fix in _SYNTAX_FIXES.items() if words in said), "mend the syntax")
        problem = f"not YAML ({said})"
        raise RecipeError((Mistake(file=shown_as, line=line, key="-", problem=problem, fix=fix),)) from error
    except yaml.reader.ReaderError as error:
        problem = f"holds the character #x{error.character:04x}, which YAML has not"
        raise RecipeError((_whole_file(shown_as, problem, "write text"),)) from error
    if tree is None or not isinstance(root, roots):
        raise RecipeError((_whole_file(shown_as, "is not a mapping", "write `key: value` lines"),))
    if mistakes:
        raise RecipeError(tuple(mistakes))
    return tree


def parse_value(text: str, *, shown_as: str) -> Node:
    """One value as YAML reads it, for `--set key=value`."""
    return parse_yaml(f"value: {text}", shown_as=shown_as).nearest(("value",))


def _whole_file(shown_as: str, problem: str, fix: str) -> Mistake:
    return Mistake(file=shown_as, line=1, key="-", problem=problem, fix=fix)


def _convert(node: yaml.Node, file: str, path: Path_, mistakes: list[Mistake]) -> Node:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        return Node(_convert_mapping(node, file, path, mistakes), file, line)
    if isinstance(node, yaml.SequenceNode):
        items = [_convert(item, file, (*path, index), mistakes) for index, item in enumerate(node.value)]
        return Node(items, file, line)
    return Node(_scalar(node), file, line, str(node.value))


def _convert_mapping(
    node: yaml.MappingNode, file: str, path: Path_, mistakes: list[Mistake]
) -> dict[str, Node]:
    mapping: dict[str, Node] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        line = key_node.start_mark.line + 1
        if key in mapping:
            problem = f"written twice (first in line {mapping[key].line})"
            fix = "delete one of the two lines"
            mistakes.append(Mistake(file=file, line=line, key=dotted((*path, key)), problem=problem, fix=fix))
            continue
        child = _convert(value_node, file, (*path, key), mistakes)
        # a value stands where its key is written; the constructor takes a third of dataclasses.replace
        mapping[key] = Node(child.value, file, line, child.text)
    return mapping


def _scalar(node: yaml.Node) -> Scalar:
    """The Python value of a YAML scalar; what YAML would turn into dates or sexagesimals stays text."""
    kind = node.tag.rsplit(":", 1)[-1]
    text = str(node.value)
    if kind == "null":
        return None
    if kind == "bool" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind == "int" and ":" not in text:
        return int(text.replace("_", ""), 0) if not text.lstrip("+-").startswith("0") else _leading_zero(text)
    if kind == "float" and ":" not in text:
        return float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _leading_zero(text: str) -> Scalar:
    """YAML 1.1 reads 010 as eight; only 0 and 0x.. mean what they look like."""
    if text.lstrip("+-") == "0" or text.lower().lstrip("+-").startswith("0x"):
        return int(text, 0)
    return text


def dotted(path: Path_) -> str:
    """`('parallel', 'layout')` as `parallel.layout`."""
    return ".".join(str(element) for element in path) or "-"
