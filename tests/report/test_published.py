"""The table of published rows and the list of contradictions, as a reader and a script see them."""

import csv
import io
import json
from pathlib import Path

import pytest

from moe_bench.cli import main
from moe_bench.report.published import published_line
from moe_bench.results.published import load_rows, row_by_id
from moe_bench.spec.catalogue import data_root, recipes_root
from moe_bench.spec.load import Loader

PUBLISHED = data_root() / "results" / "published"
AUTOMODEL = "automodel-deepseek-v3-h100-256gpu-bf16-s4096"


def test_a_line_holds_the_printed_and_the_renormalised_number() -> None:
    row = row_by_id(PUBLISHED, AUTOMODEL)
    line = published_line(row, Loader(root=recipes_root()).model("deepseek_v3"))
    assert line["layout"] == "PP4 VPP8 EP64 FSDP2"
    assert (line["tokens_per_s_per_gpu"], line["tokens_per_s_basis"]) == (1002, "printed")
    assert (line["printed_tflops_per_gpu"], line["flops_convention"]) == (250, "automodel")
    assert line["tflops_per_gpu"] == pytest.approx(250.3, abs=0.05)
    assert line["flops_counting"] == "mcore-windowed"


def test_a_line_without_an_architecture_claims_no_count_of_ours() -> None:
    line = published_line(row_by_id(PUBLISHED, AUTOMODEL), None)
    assert line["tflops_per_gpu"] is None
    assert line["flops_counting"] is None
    assert line["printed_tflops_per_gpu"] == 250


def test_the_table_the_csv_and_the_json_hold_the_same_rows(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["published", "--model", "deepseek_v3", "--system", "h100_sxm", "--precision", "bf16"]
    assert main([*chosen, "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert main([*chosen, "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["id"] for row in rows] == [line["id"] for line in lines]
    assert AUTOMODEL in [row["id"] for row in rows]
    assert main(chosen) == 0
    text = capsys.readouterr().out
    assert all(row["id"] in text for row in rows)
    assert f"{len(rows)} rows; {len(rows)} renormalised to mcore-windowed" in text


def test_an_unknown_model_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["published", "--model", "deepseek_v33"]) == 2
    assert "did you mean 'deepseek_v3'" in capsys.readouterr().err


def test_the_check_of_the_registry_passes_and_counts_on_its_first_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["published", "--check"]) == 0
    first, _, rest = capsys.readouterr().out.partition("\n")
    num_rows = len(load_rows(PUBLISHED))
    assert first == f"{num_rows} rows: 26 contradict themselves in 27 places; 0 without a known cause"
    assert "counted two matrices per gated expert" in rest


def test_the_check_fails_on_a_row_that_nobody_has_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results" / "published" / "known").mkdir(parents=True)
    (tmp_path / "results" / "published" / "known" / "contradictions.yaml").write_text("known: []\n")
    planted = (PUBLISHED / "olmoe_1b_7b.yaml").read_text()
    (tmp_path / "results" / "published" / "olmoe_1b_7b.yaml").write_text(
        planted.replace("  metrics:", "  num_gpus: 8\n  gbs: 7\n  mbs: 2\n  tp: 1\n  pp: 3\n  metrics:", 1)
    )
    monkeypatch.setattr("moe_bench.cli.read.data_root", lambda: tmp_path)
    assert main(["published", "--check", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert {one["check"] for one in found} == {"layout"}
    assert {one["cause"] for one in found} == {None}
