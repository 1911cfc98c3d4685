"""Published rows from a file in either schema: the project's own, or the flat one of raw tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import get_args

from moe_bench.errors import Mistake, RecipeError
from moe_bench.results.flat_text import LOOSE_TEXTS, Columns, columns_of_note, columns_of_other
from moe_bench.results.flops_convention import FlopsConvention
from moe_bench.results.published import Metrics, PublishedPrecision, PublishedRow, Source, published_rows
from moe_bench.spec.load import shown
from moe_bench.spec.yaml_tree import Node, read_yaml_list_or_mapping

_SAME = (
    "id", "kind", "model", "hardware", "num_gpus", "seq_len", "mbs", "gbs", "ga", "tp", "pp", "vpp", "cp",
    "ep", "etp", "dp", "ep_overlap", "mtp", "force_load_balance", "token_drop", "framework", "trust",
    "series", "note",
)  # fmt: skip
"""Columns that both schemas have, with equal values."""
_OPTIONAL = ("local_batch", "layout", "capacity_factor", "num_layers")
"""Columns of the project's schema that a flat row may print beside its free text."""
_OWN = (
    "precision", "version_date", "metrics", "derived", "source", "flops_convention", "other",
    *LOOSE_TEXTS,
)  # fmt: skip
FLAT_COLUMNS = _SAME + _OPTIONAL + _OWN

_ESTIMATES = {
    "tokens_per_s_per_gpu_est_from_tflops": "tflops",
    "tokens_per_s_per_gpu_est_from_mfu_full_attention": "mfu_full_attention",
}
_CONVENTIONS = {"n/a": None, "megatron (Primus)": FlopsConvention.PRIMUS.value}
"""Conventions that the two schemas call differently."""
_PRECISION_WORDS = (
    ("NVFP4", "NVFP4"),
    ("MXFP8", "MXFP8"),
    ("BLOCK", "FP8-blockwise"),
    ("CURRENT", "FP8-current-scaling"),
    ("TENSORWISE", "FP8-current-scaling"),
    ("DELAYED", "FP8-delayed"),
    ("FP8", "FP8"),
    ("BF16", "BF16"),
)


def read_registry(path: Path) -> tuple[PublishedRow, ...]:
    """Every row of `path`: `rows:` in the project's schema, or a list in the flat one (docs/registry.md).

    Raises RecipeError with file, line and key of every mistake.
    """
    root = read_yaml_list_or_mapping(path, shown_as=shown(path))
    if isinstance(root.value, list):
        mistakes = [mistake for item in root.value for mistake in _mistakes(item)]
        if mistakes:
            raise RecipeError(tuple(mistakes))
        converted = Node([_row(item) for item in root.value], root.file, root.line)
        root = Node({"rows": converted}, root.file, root.line)
    rows = published_rows(root)
    _require_distinct_ids(rows, root)
    return rows


def _require_distinct_ids(rows: tuple[PublishedRow, ...], root: Node) -> None:
    first: dict[str, int] = {}
    mistakes = []
    for index, row in enumerate(rows):
        if row.id in first:
            place = root.nearest(("rows", index, "id"))
            problem = f"{row.id} is also the id of row {first[row.id] + 1}"
            mistakes.append(
                Mistake(
                    file=place.file, line=place.line, key=f"rows.{index}.id", problem=problem,
                    fix="give each row an id of its own",
                )
            )  # fmt: skip
        first.setdefault(row.id, index)
    if mistakes:
        raise RecipeError(tuple(mistakes))


def _mistakes(item: Node) -> Iterator[Mistake]:
    if not isinstance(item.value, dict):
        yield Mistake(
            file=item.file, line=item.line, key="-", problem="is not a mapping", fix="write `- id: ...`"
        )
        return
    for key, child in item.value.items():
        if key not in FLAT_COLUMNS:
            near = get_close_matches(key, FLAT_COLUMNS, n=1)
            fix = f"did you mean {near[0]!r}?" if near else "docs/registry.md lists the columns"
            yield Mistake(file=child.file, line=child.line, key=key, problem="unknown column", fix=fix)


def _row(item: Node) -> Node:
    """A flat row in the project's schema; every value keeps the line where it is written."""
    flat = _printed(item)
    columns: Columns = {key: flat[key] for key in _SAME if key in flat}
    unread: list[str] = []
    for key, read in LOOSE_TEXTS.items():
        if key not in flat:
            continue
        found = read(_text(flat[key]))
        if found is None:
            unread.append(f"{key}: {_text(flat[key])}")
        else:
            columns |= _placed(found, flat[key])
    if "precision" in flat:
        columns["precision"] = _known_word(flat["precision"], _precision)
    if "version_date" in flat:
        columns["version"] = replace(flat["version_date"], value=_text(flat["version_date"]))
    if "flops_convention" in flat:
        columns |= _convention(flat["flops_convention"])
    # a remark never overrides what a column prints
    columns = _other(flat.get("other"), unread, item) | columns
    if "note" in flat:
        columns = _placed(columns_of_note(_text(flat["note"])), flat["note"]) | columns
    columns |= {key: flat[key] for key in _OPTIONAL if key in flat}
    columns["metrics"] = _only(flat.get("metrics", Node({}, item.file, item.line)), set(Metrics.model_fields))
    columns["source"] = _only(flat.get("source", Node({}, item.file, item.line)), set(Source.model_fields))
    if "derived" in flat:
        columns |= _estimate(flat["derived"])
    return Node(columns, item.file, item.line)


def _printed(node: Node) -> Columns:
    """The entries of a mapping that hold something; tables write `.nan` and `128.0` for null and 128."""
    if not isinstance(node.value, dict):
        return {}
    kept = {}
    for key, child in node.value.items():
        value = child.value
        if value is None or value == {} or (isinstance(value, float) and math.isnan(value)):
            continue
        is_whole = isinstance(value, float) and value.is_integer()
        kept[key] = replace(child, value=int(value)) if is_whole and isinstance(value, float) else child
    return kept


def _only(node: Node, known: set[str]) -> Node:
    """A block of figures without those that no column of the project holds."""
    return replace(node, value={key: child for key, child in _printed(node).items() if key in known})


def _text(node: Node | None) -> str:
    return "" if node is None else node.text or str(node.value)


def _placed(columns: dict[str, object], at: Node) -> Columns:
    return {key: _node(value, at) for key, value in columns.items()}


def _node(value: object, at: Node) -> Node:
    if isinstance(value, dict):
        return Node({str(key): _node(child, at) for key, child in value.items()}, at.file, at.line)
    if isinstance(value, list | tuple):
        return Node([_node(child, at) for child in value], at.file, at.line)
    assert value is None or isinstance(value, str | int | float | bool)  # noqa: S101 - what flat_text makes
    return Node(value, at.file, at.line)


def _known_word(node: Node, word: Callable[[str], str | None]) -> Node:
    """`node` in the project's words; left as it is, for validation to refuse, where there is none."""
    found = word(_text(node))
    return node if found is None else replace(node, value=found)


def _precision(text: str) -> str | None:
    if text in get_args(PublishedPrecision):
        return text
    return next((name for word, name in _PRECISION_WORDS if word in text.upper()), None)


def _convention(node: Node) -> Columns:
    text = _text(node)
    if text in _CONVENTIONS:
        named = _CONVENTIONS[text]
    else:
        known = {convention.value for convention in FlopsConvention}
        named = text if text in known else FlopsConvention.UNKNOWN.value
    return {} if named is None else {"flops_convention": replace(node, value=named)}


def _other(node: Node | None, unread: list[str], item: Node) -> Columns:
    at = node or item
    found = columns_of_other(_text(node))
    rest = "; ".join([text for text in (str(found.pop("other", "")), *unread) if text])
    columns = _placed(found, at)
    return columns | ({"other": Node(rest, at.file, at.line)} if rest else {})


def _estimate(derived: Node) -> Columns:
    """A throughput that the table works out with an assumption; every other derived figure is computed."""
    figures = _printed(derived)
    for key, basis in _ESTIMATES.items():
        if key in figures:
            at = figures[key]
            value: dict[str, Node] = {"tokens_per_s_per_gpu": at, "basis": Node(basis, at.file, at.line)}
            return {"estimate": Node(value, at.file, at.line)}
    return {}
