"""The memory of a recipe by category and tensor, as a table and as data."""

import json

import pytest

from moe_bench.cli import main

FSDP = "mixtral_8x22b/h100_sxm_128g_bf16_fsdp"


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["show", *arguments, "--memory"]) == 0
    return capsys.readouterr().out


def test_categories_that_no_stage_has_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert "synchronisation" not in printed(capsys, "qwen3_30b_a3b")
    assert "pipeline" not in printed(capsys, FSDP)
    assert "synchronisation" in printed(capsys, FSDP)


def test_every_stage_and_tensor_is_there_in_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(printed(capsys, "deepseek_v3/h200_256g_bf16", "--json"))
    assert [stage["pipeline_rank"] for stage in found["stages"]] == [0, 1, 2, 3]
    kept = found["kept_bytes_per_layer_and_micro_batch"]
    assert list(kept) == ["dense", "experts"]
    assert kept["experts"]["expert_input"] == 4096 * 8 * 2 * 7168


def test_full_recomputation_keeps_one_tensor_per_layer(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(printed(capsys, "deepseek_v3", "--json"))
    vector_bytes = 4096 * 2 * 7168
    assert found["kept_bytes_per_layer_and_micro_batch"]["experts"] == {"layer_input": vector_bytes}
