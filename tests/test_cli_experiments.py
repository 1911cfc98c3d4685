"""Repeats and experiments on the command line: what is queued, in which order, and what is refused."""

import json
import shlex
from pathlib import Path

import pytest

from moe_bench.cli import main
from moe_bench.results.record import Record
from tests.results.records import record

SUBMIT = ["submit", "qwen3_30b_a3b/h100_sxm_16g_bf16_alltoall", "--site", "default", "--dry-run"]


def what_runs(line: str) -> str:
    """What follows the script in a line of `submit --dry-run`."""
    words = shlex.split(line)
    script = next(index for index, word in enumerate(words) if word.endswith("run_recipe.sh"))
    return " ".join(words[script + 2 :])


def test_an_experiment_is_submitted_interleaved(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SUBMIT, "--vary", "dispatcher=alltoall,allgather", "--repeats", "2"]) == 0
    lines = [what_runs(line) for line in capsys.readouterr().out.splitlines()]
    change = "--scale full --set dispatch.dispatcher="
    assert lines == [
        f"{change}alltoall --site default",
        f"{change}allgather --site default",
        f"{change}alltoall --repeat 1 --site default",
        f"{change}allgather --repeat 1 --site default",
    ]


def test_an_experiment_as_json_is_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SUBMIT, "--repeats", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 3
    assert main([*SUBMIT, "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)


def test_an_illegal_variant_is_refused_before_anything_is_queued(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*SUBMIT, "--vary", "parallel.expert=16,48"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--set parallel.expert=48" in captured.err


def test_a_rank_cannot_repeat_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert main(["run", "qwen3_30b_a3b", "--scale", "smoke", "--repeats", "2"]) == 2
    assert "use submit --repeats" in capsys.readouterr().err


def test_every_repeat_has_a_record_and_the_last_line_says_what_lies_between_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(plan: object, *, repeat: int, **_: object) -> Record:
        return record(step_times_s=((0.1,) * 10,) * 2, repeat=repeat)

    monkeypatch.setattr("moe_bench.harness.start.load_measure", lambda: measure)
    asked = ["run", "qwen3_30b_a3b/h100_sxm_8g_bf16", "--scale", "smoke", "--repeats", "3"]
    assert main([*asked, "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(list(tmp_path.rglob("*.json"))) == 3
    assert [line.split(":")[0] for line in lines if line.startswith("run ")] == ["run 2", "run 3"]
    assert lines[-1].startswith("3 runs: 5,120 tokens/s/process, 5,120 to 5,120 between runs")
