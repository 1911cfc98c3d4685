"""The verbs that look at training: the experts of a run, and what parity does not compare."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_bench.cli import main
from moe_bench.results.training_health import Alarm, HealthLine, LayerHealth, append_health

CAPACITY = "mixtral_8x22b/h100_sxm_128g_bf16_capacity"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of four steps with two layers, the second of which has fewer experts."""
    alarm = Alarm(step=4, layer="decoder.1", expert=0, kind="share", alarm_limit=0.5, value=0.75)
    for step, alarms in ((2, ()), (4, (alarm,))):
        layers = tuple(
            LayerHealth(layer=name, top_k=1, num_tokens=8, tokens_per_expert=tokens, expert_bias_range=None)
            for name, tokens in (("decoder.0", (2, 2, 2, 2)), ("decoder.1", (6, 2)))
        )
        append_health(tmp_path, HealthLine(step=step, num_steps=2, layers=layers, alarms=alarms))
    return tmp_path


def test_the_experts_of_a_run_are_shown_with_their_alarms(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["health", str(folder), "--plot", str(folder / "health.svg")]) == 0
    out = capsys.readouterr().out
    assert "steps 3 to 4" in out
    assert "ALARM step 4: decoder.1: expert 0 takes 75.0% of the tokens (alarm above 50.0%)" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith("decoder")}
    assert rows["decoder.0"] == ["1.0000", "0", "25.0%", "25.0%", "0.00%", "0", "-"]
    assert rows["decoder.1"] == ["0.8113", "0", "75.0%", "50.0%", "0.00%", "0", "-"]
    assert "expert load" in (folder / "health.svg").read_text()


def test_a_full_disk_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "health.svg").symlink_to("/dev/full")
    assert main(["health", str(folder), "--plot", str(folder / "health.svg")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "No space left on device" in line


def test_programs_get_every_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", str(folder), "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[1]["layers"][1]["busiest_share_fraction"] == 0.75


def test_a_folder_without_a_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "health.jsonl: nothing there" in line


def test_a_router_that_sees_later_tokens_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["parity", "olmoe_1b_7b_expert_choice", "--scale", "smoke", "--data", str(tmp_path / "none")]
    assert main([*asked, "--vary", "seed=7"]) == 2
    assert "sees later tokens" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "what is compared? name two recipes"),
        (["olmoe_1b_7b"], "what is compared? name two recipes"),
        (["olmoe_1b_7b", "--all", "--vary", "seed=7"], "--all and --again are of --plain"),
        (["--plain"], "add --scale smoke"),
        (["--plain", "--scale", "smoke"], "name some, or --all"),
        (["--plain", "--scale", "smoke", "--all", "olmoe_1b_7b"], "name some, or --all"),
        (["--plain", "olmoe_1b_7b", "--vary", "seed=7"], "drop --vary, or drop --plain"),
        (["olmoe_1b_7b", "mixtral_8x7b", "--scale", "smoke"], "another model than olmoe_1b_7b"),
        (["olmoe_1b_7b", "--vary", "dispatcher=none"], "dispatch.dispatcher: "),
        (["olmoe_1b_7b", "--vary", "dispatchr=alltoall"], "did you mean 'dispatcher'"),
        (["--plain", "olmoe_1b_7b_sinkhorn", "--scale", "smoke"], "the sinkhorn router sees later tokens"),
        (["--plain", CAPACITY, "--scale", "smoke"], "(probs) sees later tokens"),
    ],
)
def test_what_parity_cannot_compare_is_said_at_once(
    arguments: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["parity", *arguments, "--data", str(tmp_path / "none")]) == 2
    assert problem in capsys.readouterr().err.splitlines()[-1]


def test_of_all_recipes_one_that_cannot_be_compared_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["mixtral_8x7b/h100_sxm_64g_bf16", "olmoe_1b_7b_sinkhorn/h100_sxm_8g_bf16"]
    monkeypatch.setattr("moe_bench.cli.parity._shipped", lambda: names)
    asked = ["parity", "--plain", "--all", "--scale", "smoke", "--data", str(tmp_path / "none")]
    assert main([*asked, "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert f"{names[1]}: not compared: the sinkhorn router sees later tokens" in said.out
    assert f"{names[0]}: {tmp_path / 'none'}" in said.err.splitlines()[-1]
    assert not (tmp_path / "parity").exists()
