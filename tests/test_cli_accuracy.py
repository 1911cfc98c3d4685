"""`moe-bench accuracy` as a user meets it, on a small file of rows."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from moe_bench.cli import main

ROW = """- id: {id}
  kind: pretrain
  model: Qwen3-30B-A3B
  hardware: H100
  num_gpus: {num_gpus}
  precision: BF16
  seq_len: 4096
  mbs: 1
  gbs: 1024
  tp: 1
  pp: 1
  ep: 8
  metrics: {{tokens_per_s_per_gpu: {tokens_per_s}}}
  framework: Megatron-Bridge
  version: NeMo 26.04 (v0.4.0, 2026-04)
  source: {{table: made}}
  trust: A
"""


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    path = tmp_path / "rows.yaml"
    rows = [
        ROW.format(id="made", num_gpus=16, tokens_per_s=9000.0),
        ROW.format(id="larger", num_gpus=32, tokens_per_s=8900.0),
        ROW.format(id="wrong", num_gpus=64, tokens_per_s=900.0),
        ROW.format(id="unknown", num_gpus=16, tokens_per_s=9000.0).replace("Qwen3-30B-A3B", "Nothing-1B"),
    ]
    path.write_text("rows:\n" + "".join(rows))
    return path


def test_every_row_of_a_file_is_projected_or_named(
    capsys: pytest.CaptureFixture[str], registry: Path
) -> None:
    assert main(["accuracy", "--registry", str(registry), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["rows"], made["projected"], made["counted"]) == (4, 3, 3)
    assert [one["id"] for one in made["not_projected"]] == ["unknown"]
    assert made["not_projected"][0]["prints_full_layout"] is True
    assert [one["id"] for one in made["suspects"]] == ["wrong"]
    assert "2 other rows of its model, GPU and precision" in made["suspects"][0]["evidence"]
    assert made["cross_validation"] is None


def test_errors_are_those_of_the_rows(capsys: pytest.CaptureFixture[str], registry: Path) -> None:
    assert main(["accuracy", "--registry", str(registry), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    errors = []
    for row in made["per_row"]:
        error = row["published_tokens_per_s_per_gpu"] / row["projected_tokens_per_s_per_gpu"] - 1
        assert row["step_time_error_fraction"] == pytest.approx(error)
        assert row["assumptions"]
        errors.append(abs(error))
    assert made["step_time_mape_fraction"] == pytest.approx(sum(errors) / len(errors))
    assert made["step_time_median_fraction"] == pytest.approx(sorted(errors)[1])
    for key in ("step_time_bias_fraction", "step_time_p90_fraction", "baseline_step_time_mape_fraction"):
        assert key in made
    assert set(made["groups"]) == {"kind", "model", "system", "precision", "release", "framework"}
    assert made["groups"]["system"]["h100"]["rows"] == 3


def test_tables_and_csv_show_the_same_rows(capsys: pytest.CaptureFixture[str], registry: Path) -> None:
    assert main(["accuracy", "--registry", str(registry)]) == 0
    text = capsys.readouterr().out
    assert "3 published rows under the shipped constants" in text
    assert "suspects: contradicted by more than 40%" in text
    assert "not projected: unknown: no architecture facts of Nothing-1B" in text
    assert main(["accuracy", "--registry", str(registry), "--csv"]) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [line["id"] for line in lines] == ["made", "larger", "wrong"]


def test_a_file_of_which_nothing_can_be_projected_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "rows.yaml"
    row = ROW.format(id="unknown", num_gpus=16, tokens_per_s=9000.0).replace("Qwen3-30B-A3B", "Nothing-1B")
    path.write_text("rows:\n" + row)
    assert main(["accuracy", "--registry", str(path)]) == 0
    assert "no row of this file can be projected" in capsys.readouterr().out
    assert main(["accuracy", "--registry", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["projected"] == 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--registry", "missing.yaml"), "missing.yaml"),
        (("--cross-validate", "colour"), "colour"),
        (("--csv", "--json"), "keep one of them"),
    ],
)
def test_a_mistake_ends_with_two(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], problem: str
) -> None:
    assert main(["accuracy", *arguments]) == 2
    assert problem in capsys.readouterr().err
