"""What `show --comms` prints adds up, and says what a rank's JSON says."""

import json

import pytest

from moe_bench.cli import main


def test_the_json_has_every_line_of_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "deepseek_v3", "--comms", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["num_micro_batches"] == 8
    assert len(answer["stages"]) == 4
    lines = answer["stages"][2]
    assert {line["place"] for line in lines} >= {"decoder.3", "decoder.4", "-"}
    (sent,) = (line for line in lines if line["collective"] == "send")
    # 8 chunks of the stage, each with two neighbours, 8 micro batches, 4096 x 7168 x 2 bytes
    assert sent["num_calls"] == 8 * 2 * 8
    assert sent["num_bytes"] == 128 * 58_720_256


def test_the_table_shows_the_busiest_stage_and_the_totals_of_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["show", "deepseek_v3", "--comms", "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    totals = [sum(line["num_bytes"] for line in stage) / 1e9 for stage in stages]
    assert main(["show", "deepseek_v3", "--comms"]) == 0
    text = capsys.readouterr().out
    assert f"pipeline stage {totals.index(max(totals))} " in text
    for total in totals:
        assert f"{total:,.3f}" in text


def test_a_change_of_layout_changes_the_groups(capsys: pytest.CaptureFixture[str]) -> None:
    change = ["--set", "dispatch.dispatcher=alltoall"]
    assert main(["show", "deepseek_v3", "--comms", "--json", *change]) == 0
    lines = json.loads(capsys.readouterr().out)["stages"][0]
    assert {line["collective"] for line in lines if line["what"] == "dispatch"} == {"all_to_all"}
