"""`moe-bench layer` as a user meets it: a toy layer on the CPU, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_bench.cli import main
from moe_bench.results.calibration import CPU
from moe_bench.results.layer_record import LayerRecord, read_layer_record
from moe_bench.results.sonicmoe import SHAPES

pytestmark = [
    pytest.mark.usefixtures("no_gpu"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron"),
]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested is the CPU path, also on a machine with a GPU; torch sees none either."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("moe_bench.cli.layer.gpu_here", lambda: None)


def records(root: Path) -> list[LayerRecord]:
    return [read_layer_record(path) for path in sorted((root / "layer" / CPU).iterdir())]


def test_a_toy_layer_is_taken_apart_and_written_with_everything_that_was_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["layer", "deepseek_v3", "--tiny", "--json", "--out", str(tmp_path)]
    options = ["--tokens", "96", "--routing", "power_law:0.5", "--precision", "fp32", "--held-seconds", "0.2"]
    assert main([*asked, *options, "--experts", "torch_native", "--experts", "sequential"]) == 0
    printed = json.loads(capsys.readouterr().out)
    by_path = [read_layer_record(Path(one["path"])) for one in printed]
    assert [one.engine for one in by_path] == ["megatron torch_native", "megatron torch_native SequentialMLP"]
    for one in by_path:
        assert one.is_tiny
        assert (one.case.num_tokens, one.case.precision, one.case.routing.exponent) == (96, "fp32", 0.5)
        assert one.held is not None
        assert one.case.name == "deepseek_v3/h100_sxm_256g_bf16"
        assert any("deepep" in difference for difference in one.differences)
    assert len(records(tmp_path)) == 2
    assert main(["report", str(tmp_path), "--layers"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("deepseek_v3/h100_sxm_256g_bf16") == 2
    assert "megatron torch_native SequentialMLP" in shown
    assert main(["report", str(tmp_path), "--layers", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert [one["record"] for one in again] == [one["record"] for one in printed]


def test_where_no_layer_was_measured_the_report_says_what_measures_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path), "--layers"]) == 2
    assert "no layer was measured; moe-bench layer does that" in capsys.readouterr().err


def test_a_folded_layer_is_compared_and_a_sweep_is_drawn(tmp_path: Path) -> None:
    out = ["--tiny", "--out", str(tmp_path)]
    assert main(["layer", "qwen3_30b_a3b", *out, "--folded", "--peers", "textbook"]) == 0
    (folded,) = records(tmp_path)
    assert folded.case.ep_size == 1
    assert folded.peers is not None
    assert {one.engine for one in folded.peers.engines} == {"torch_native", "textbook"}
    picture = tmp_path / "sweep.svg"
    assert main(["layer", "qwen3_30b_a3b", *out, "--sweep", "--plot", str(picture)]) == 0
    loads = [one.case.routing.label for one in records(tmp_path) if one.peers is None]
    assert len(loads) == len(set(loads)) == 6
    assert picture.stat().st_size > 0


def test_a_graph_is_asked_of_a_gpu_and_refused_before_anything_is_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["layer", "qwen3_30b_a3b", "--tiny", "--graph", "--out", str(tmp_path)]) == 3
    assert "a CUDA graph of the MoE layer: torch sees no GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_real_sizes_without_a_gpu_stop_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layer", "deepseek_v3"]) == 3
    assert "--tiny" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "a recipe, or a suite"),
        (["deepseek_v3", "--suite", "sonicmoe"], "one of the two"),
        (["deepseek_v3", "--plot", "x.svg"], "add --sweep"),
        (["deepseek_v3", "--tiny", "--routing", "power_law:steep"], "unknown; write balanced"),
        (["deepseek_v3", "--tiny", "--routing", "power_law:²"], "unknown; write balanced"),
        (["--suite", "sonicmoe", "--set", "seq_len=1"], "a suite has none"),
        (["deepseek_v3", "--plan", "--graph", "--routing", "random"], "drop --graph, --routing"),
        (["deepseek_v3", "--system", "h200"], "add --plan"),
        (["deepseek_v3", "--tiny", "--routing", "missing.json"], "No such file"),
        (["deepseek_v3", "--tiny", "--peers", "textbook,tutel"], "peer tutel: no such engine; known are"),
    ],
)
def test_what_cannot_be_used_as_written_is_named(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["layer", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_experts_that_are_not_installed_stop_with_the_package(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--tiny", "--out", str(tmp_path)]
    assert main(["layer", "deepseek_v3", *out, "--experts", "quack"]) == 3
    assert "quack" in capsys.readouterr().err
    assert not (tmp_path / "layer").exists()


@pytest.mark.slow
def test_the_suite_measures_its_twelve_layers(tmp_path: Path) -> None:
    assert main(["layer", "--suite", "sonicmoe", "--tiny", "--out", str(tmp_path)]) == 0
    found = records(tmp_path)
    assert {one.case.name for one in found} == {shape.name for shape in SHAPES}
    assert {one.suite for one in found} == {"sonicmoe"}


def test_a_plan_leaves_out_what_kernels_cannot_run_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["layer", "gpt_oss_120b", "--plan", "--json", "--experts", "quack"]
    assert main([*asked, "--experts", "torch_native"]) == 0
    printed = capsys.readouterr()
    (planned,) = json.loads(printed.out)
    assert planned["case"]["kernels"]["family"] == "torch_native"
    assert "not on quack: kernels.family: quack with clamped_swiglu" in printed.err
    assert main(asked) == 3
    assert "nothing that was asked for can be built on h100_sxm" in capsys.readouterr().err


def test_a_plan_is_for_the_system_of_the_recipe_or_the_one_that_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = "deepseek_v3/gb300_nvl72_256g_mxfp8"
    assert main(["layer", recipe, "--plan"]) == 0
    assert "projected for gb300_nvl72" in capsys.readouterr().out
    assert main(["layer", recipe, "--plan", "--system", "h100_sxm"]) == 3
    assert "mxfp8 on h100_sxm" in capsys.readouterr().err
