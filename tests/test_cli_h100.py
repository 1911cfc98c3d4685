"""`moe-bench h100` as a user meets it: planned, refused without a GPU, and run as a whole with toys."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_bench.cli import main
from moe_bench.results.campaign import campaign_folder, read_campaign
from moe_bench.results.journal import UNFINISHED

COMMAND = (sys.executable, "-m", "moe_bench", "h100", "--tiny")


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested is the CPU path, also on a machine with a GPU; torch sees none either."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr("moe_bench.cli.gpu.gpu_here", lambda: None)


def test_the_plan_prints_every_step_with_seconds_memory_and_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["h100", "--plan"]) == 0
    text = capsys.readouterr().out
    heading, first, second, third, *_ = text.splitlines()
    assert heading.split() == ["#", "step", "s", "GiB", "command", "tells"]
    assert first.split()[:2] == ["1", "tests"]
    assert second.split()[:2] == ["2", "ceilings"]
    assert third.split()[1:3] == ["slice", "deepseek_v3/h100_sxm_1024g_bf16"]


def test_the_plan_is_about_the_budget(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["h100", "--plan", "--json", "--budget-seconds", "600"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert 0 < plan["estimated_s"] <= 600
    assert plan["over_budget"]


def test_without_a_gpu_it_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["h100"]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--plan" in error
    assert "--tiny" in error


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--plan", "--only", "slices"], "--only slices: unknown; choose from tests,"),
        (["--tiny", "--system", "h200"], "--system estimates without a GPU; add --plan"),
        (["--tiny", "--retry"], "--retry takes up steps of a campaign that was begun"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(
    options: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["h100", *options]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1


def test_there_is_nothing_to_go_on_with_where_nothing_was_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["h100", "--tiny", "--resume", "--out", str(tmp_path)]) == 2
    assert f"no unfinished campaign of cpu in {tmp_path}; leave it off" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_list_is_killed_half_way_and_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["h100", "--tiny", "--plan", "--json"]) == 0
    wanted = [step["key"] for step in json.loads(capsys.readouterr().out)["steps"]]
    folder = campaign_folder(tmp_path, "cpu")
    process = subprocess.Popen([*COMMAND, "--out", str(tmp_path)], stderr=subprocess.DEVNULL)
    while process.poll() is None and _num_noted(folder) < len(wanted) // 2:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (journal,) = folder.glob(f".*{UNFINISHED}")
    noted = journal.read_bytes().splitlines()[1:]
    resumed = subprocess.run(
        [*COMMAND, "--resume", "--json", "--out", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert resumed.returncode == 0, resumed.stderr
    campaign = read_campaign(Path(json.loads(resumed.stdout)["path"]))
    assert [one.step.key for one in campaign.outcomes] == wanted
    assert [one.model_dump_json().encode() for one in campaign.outcomes][: len(noted)] == noted
    assert {one.reason for one in campaign.outcomes if not one.is_done} == {
        "transformer_engine needs a GPU",
        "quack needs a GPU",
    }
    for one in campaign.outcomes:
        assert all((tmp_path / name).is_file() for name in one.files)
        assert one.files or not one.is_done or one.step.program == "pytest"


def _num_noted(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") - 1 for path in folder.glob(f".*{UNFINISHED}"))


def test_what_is_to_be_reached_is_printed_beside_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["h100", "--reach", "--out", str(tmp_path)]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("0 reached, 0 missed,")
    assert main(["h100", "--reach", "--json", "--out", str(tmp_path)]) == 0
    assert {one["measured"] for one in json.loads(capsys.readouterr().out)} == {None}
