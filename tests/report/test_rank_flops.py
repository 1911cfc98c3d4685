"""What `show --flops` prints adds up to what its JSON says."""

import json

import pytest

from moe_bench.cli import main


def test_the_table_adds_up_the_lines_of_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "gpt_oss_20b", "--flops", "--json"]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    attention = [line for line in stage if line["kernel"] == "attention"]
    assert {line["place"] for line in attention} == {f"decoder.{layer}" for layer in range(24)}
    forward = sum(line["forward_flops"] for line in attention)
    assert main(["show", "gpt_oss_20b", "--flops"]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if " attention " in line)
    assert row.split()[2] == f"{forward / 1e12:,.1f}"
