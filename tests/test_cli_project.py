"""`moe-bench project` as a user meets it: what it prints, writes and refuses."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from moe_bench.cli import main
from moe_bench.results.store import write_record
from tests.results.records import record

DEEPSEEK = "deepseek_v3"


def projected(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    """What `--json` prints."""
    assert main(["project", *arguments, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert isinstance(made, dict)
    return made


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a mistake."""
    assert main(["project", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("name", [DEEPSEEK, "qwen3_30b_a3b", "mixtral_8x22b/h100_sxm_128g_bf16_fsdp"])
def test_the_terms_sum_to_the_step_and_their_shares_to_one(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    made = projected(capsys, name)
    terms = made["terms"]
    assert sum(term["seconds"] for term in terms) == pytest.approx(made["step_s"], rel=1e-9)
    assert sum(term["share_fraction"] for term in terms) == pytest.approx(1, rel=1e-9)
    assert all(term["evidence"] for term in terms)


def test_rates_follow_from_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    made = projected(capsys, DEEPSEEK)  # 512 sequences of 4,096 tokens on 256 GPUs of 989.4 TFLOPs
    assert made["tokens_per_s_per_gpu"] == pytest.approx(512 * 4096 / 256 / made["step_s"])
    assert made["mfu_fraction"] == pytest.approx(made["flops_per_s_per_gpu"] / 989.4e12)
    low, high = (made["interval"]["p90"][end] for end in ("low_s", "high_s"))
    assert low < made["step_s"] < high


def test_memory_has_point_bound_and_verdict_of_every_pipeline_rank(
    capsys: pytest.CaptureFixture[str],
) -> None:
    memory = projected(capsys, DEEPSEEK)["memory"]
    assert [rank["pipeline_rank"] for rank in memory["ranks"]] == [0, 1, 2, 3]
    for rank in memory["ranks"]:
        assert rank["total_bytes"] < rank["upper_bound_bytes"] <= memory["usable_bytes"]
        assert rank["verdict"] == "fits"
    heavy = projected(capsys, DEEPSEEK, "--set", "seq_len=65536")["memory"]
    assert heavy["verdict"] == "does not fit"


def test_published_rows_stand_beside_every_projection(capsys: pytest.CaptureFixture[str]) -> None:
    nearest = projected(capsys, DEEPSEEK)["nearest"]
    assert nearest[0]["row"] == "automodel-deepseek-v3-h100-256gpu-bf16-s4096"
    for row in nearest:
        ratio = row["projected_tokens_per_s_per_gpu"] / row["published_tokens_per_s_per_gpu"]
        assert row["projected_over_published_ratio"] == pytest.approx(ratio)


def test_what_is_printed_says_that_it_is_projected_and_what_limits_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["project", DEEPSEEK]) == 0
    text = capsys.readouterr().out
    for words in (
        "nothing here was measured",
        "take most of the step",
        "where the step goes",
        "fits: ",
        "of all ranks' time (Interleaved 1F1B, simulated)",
        "nearest published row",
        "assumed: ",
    ):
        assert words in text


def test_what_if_prints_both_columns_with_the_difference(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--what-if", "constants.nic_fraction=0.6", "--what-if", "system.nic_bytes_per_s=25.0e+9")
    assert main(["project", DEEPSEEK, *asked]) == 0
    text = capsys.readouterr().out
    assert "what if constants.nic_fraction=0.6, system.nic_bytes_per_s=25.0e+9" in text
    assert "as asked" in text
    made = projected(capsys, DEEPSEEK, *asked)
    assert made["what_if"]["step_s"] > made["step_s"]
    assert made["what_if"]["changes"] == [asked[1], asked[3]]


def test_what_if_takes_the_keys_of_set_and_gives_what_set_gives(capsys: pytest.CaptureFixture[str]) -> None:
    change = "parallel.expert=32"
    beside = projected(capsys, DEEPSEEK, "--what-if", change)["what_if"]
    alone = projected(capsys, DEEPSEEK, "--set", change)
    assert beside["step_s"] == alone["step_s"]
    assert alone["modified"] == [change]


def test_a_curve_names_the_sizes_that_are_illegal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["project", DEEPSEEK, "--num-gpus", "256,300,1024"]) == 0
    text = capsys.readouterr().out
    assert "weak scaling" in text
    assert "300 GPUs: parallel" in text
    scaling = projected(capsys, DEEPSEEK, "--num-gpus", "256,512", "--strong")["scaling"]
    assert scaling["scaling"] == "strong"
    assert [point["global_batch_size"] for point in scaling["points"]] == [512, 512]


def test_a_training_is_priced(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--train-tokens", "15e12", "--price-per-gpu-hour", "2.5")
    made = projected(capsys, DEEPSEEK, *arguments)
    (training,) = made["training"]
    gpu_hours = 15e12 / made["tokens_per_s_per_gpu"] / 3600
    assert training["gpu_hours"] == pytest.approx(gpu_hours)
    assert training["price"] == pytest.approx(2.5 * gpu_hours)
    assert main(["project", DEEPSEEK, *arguments]) == 0
    assert "GPU-hours" in capsys.readouterr().out
    sizes = projected(capsys, DEEPSEEK, *arguments, "--num-gpus", "256,512")["training"]
    assert [one["num_gpus"] for one in sizes] == [256, 512]
    assert sizes[1]["time_s"] == pytest.approx(sizes[0]["time_s"] / 2, rel=0.02)


def test_a_skewed_load_is_slower_than_a_balanced_one(capsys: pytest.CaptureFixture[str]) -> None:
    balanced = projected(capsys, DEEPSEEK, "--load", "balanced")
    skewed = projected(capsys, DEEPSEEK, "--load", "power_law:0.5")
    assert skewed["load"]["busiest_over_mean_ratio"] > 1 == balanced["load"]["busiest_over_mean_ratio"]
    assert skewed["step_s"] > balanced["step_s"]


def test_a_trace_has_a_track_per_pipeline_rank(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    made = projected(capsys, DEEPSEEK, "--trace", str(path))
    events = json.loads(path.read_text())["traceEvents"]
    assert {event["tid"] for event in events if event["ph"] == "X"} == {0, 1, 2, 3}
    ends_s = [(event["ts"] + event["dur"]) / 1e6 for event in events if event["ph"] == "X"]
    assert max(ends_s) < made["step_s"]


def test_plots_are_svg_with_a_bar_per_term(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot, pipeline = tmp_path / "step.svg", tmp_path / "pipeline.svg"
    made = projected(capsys, DEEPSEEK, "--plot", str(plot), "--plot-pipeline", str(pipeline))
    bars = [one for one in ET.parse(plot).iter() if (one.get("class") or "").startswith("mark ")]
    assert len(bars) == len(made["terms"])
    assert ET.parse(pipeline).getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((DEEPSEEK, "--set", "paralel.expert=8"), "paralel"),
        ((DEEPSEEK, "--what-if", "paralel.expert=8"), "--what-if paralel.expert=8"),
        ((DEEPSEEK, "--what-if", "constants.nic=1"), "no such constant"),
        ((DEEPSEEK, "--set", "precision=fp32"), "fp32"),
        ((DEEPSEEK, "--set", "system=cpu_host"), "cpu_host"),
        ((DEEPSEEK, "--num-gpus", "many"), "write whole numbers"),
        ((DEEPSEEK, "--num-gpus", "300"), "num-gpus 300"),
        ((DEEPSEEK, "--num-gpus", "32768"), "no published run is that large"),
        ((DEEPSEEK, "--strong"), "add --num-gpus"),
        ((DEEPSEEK, "--price-per-gpu-hour", "2"), "add --train-tokens"),
        ((DEEPSEEK, "--load", "heavy"), "--load heavy"),
        (("qwen3_30b_a3b", "--trace", "trace.json"), "has no pipeline"),
        (("deepseek_v9",), "deepseek_v3"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], problem: str
) -> None:
    assert problem in refused(capsys, *arguments)


def test_reproduce_shows_projected_over_published_and_no_verdict_of_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["reproduce", DEEPSEEK, "--results", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    ours = {row["recipe"]: row for row in rows}["deepseek_v3/h100_sxm_256g_bf16"]
    ratio = ours["projected_tokens_per_s_per_gpu"] / ours["published_tokens_per_s_per_gpu"]
    assert ours["projected_over_published_ratio"] == pytest.approx(ratio)
    assert ours["verdict"] == "not run"


def test_a_model_that_did_not_run_is_projected_by_its_default_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record(tmp_path, record())  # of Qwen3-30B
    arguments = ["report", str(tmp_path), "--scaling", "--projected", "--json", "--model"]
    for model, recipe in ((DEEPSEEK, "h100_sxm_256g_bf16"), ("qwen3_30b_a3b", "h100_sxm_8g_bf16")):
        assert main([*arguments, model]) == 0
        projected = [line for line in json.loads(capsys.readouterr().out) if line["kind"] == "projected"]
        assert projected[0]["recipe_or_row"] == f"{model}/{recipe}"


def test_scaling_shows_projected_curves_when_asked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["report", str(tmp_path), "--scaling", "--model", DEEPSEEK, "--json"]
    kinds = []
    for asked in ([], ["--projected"]):
        assert main([*arguments, *asked]) == 0
        kinds.append({point["kind"] for point in json.loads(capsys.readouterr().out)})
    assert kinds == [{"published"}, {"published", "projected"}]
    assert main(["report", "--projected"]) == 2
    assert "go with --scaling" in capsys.readouterr().err
