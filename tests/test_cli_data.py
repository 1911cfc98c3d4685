"""`moe-bench data build` as a user meets it: a dataset of text, and one line where there can be none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_bench.cli import main
from moe_bench.spec.dataset import DatasetManifest


def test_paragraphs_become_documents_and_the_manifest_says_what_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    command = [
        "data",
        "build",
        str(tmp_path / "a.txt"),
        "--out",
        str(tmp_path / "set"),
        "--split",
        "paragraph",
    ]
    assert main([*command, "--json"]) == 0
    said = capsys.readouterr().out
    manifest = DatasetManifest.model_validate_json(said)
    assert json.loads(said) == json.loads((tmp_path / "set.json").read_text())
    assert (manifest.documents, manifest.num_documents, manifest.num_tokens) == ("paragraph", 2, 10)


@pytest.mark.parametrize(
    ("names", "options", "problem"),
    [
        (["missing.txt"], [], "missing.txt: no such file"),
        (["a.txt", "b.jsonl"], [], "JSON lines beside text"),
        (["b.jsonl"], ["--key", "body"], "b.jsonl:1: body: no text; name the key that has it with --key"),
        (["empty.txt"], [], "empty.txt: no text in it"),
        (["a.txt"], ["--tokenizer", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_dataset(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    names: list[str],
    options: list[str],
    problem: str,
) -> None:
    for name, content in (("a.txt", "text"), ("b.jsonl", '{"text": "a"}\n'), ("empty.txt", "")):
        (tmp_path / name).write_text(content)
    inputs = [str(tmp_path / name) for name in names]
    assert main(["data", "build", *inputs, "--out", str(tmp_path / "set"), *options]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("set.[bij]*"))
