"""YAML's silent turns become text or errors, and every node knows its line."""

from pathlib import Path

import pytest

from moe_bench.errors import RecipeError
from moe_bench.spec.yaml_tree import parse_value, parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4096", 4096),
        ("85_899", 85899),
        ("1.0e-4", 1e-4),
        ("1e-4", "1e-4"),
        ("010", "010"),
        ("0x10", 16),
        ("yes", "yes"),
        ("true", True),
        ("1:30", "1:30"),
        ("2026-11-22", "2026-11-22"),
        ("null", None),
        ('"26.10"', "26.10"),
        ("[1, 2]", [1, 2]),
    ],
)
def test_a_scalar_is_what_it_looks_like(text: str, value: object) -> None:
    assert parse_value(text, shown_as="x").plain() == value


def test_a_node_knows_its_line_and_its_typed_text() -> None:
    tree = parse_yaml("a: 1\nb:\n  c: 26.10\n", shown_as="x.yaml")
    node = tree.nearest(("b", "c"))
    assert (node.line, node.text, node.value) == (3, "26.10", 26.1)


def test_a_value_is_set_below_mappings_that_do_not_exist_yet() -> None:
    tree = parse_yaml("a: 1\n", shown_as="x.yaml")
    changed = tree.with_value_at(("b", "c"), parse_value("2", shown_as="--set"))
    assert changed.plain() == {"a": 1, "b": {"c": 2}}
    assert tree.plain() == {"a": 1}


def test_a_file_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(RecipeError, match="is not a mapping"):
        parse_yaml("- 1\n", shown_as="x.yaml")


@pytest.mark.parametrize(
    ("content", "problem"), [(b"a: \x80\n", "is not text"), (b"a: \x01\n", "holds the character #x0001")]
)
def test_a_file_that_is_no_text_is_refused(content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=problem):
        read_yaml(tmp_path / "x.yaml", shown_as="x.yaml")
