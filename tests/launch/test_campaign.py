"""The steps of a campaign: run in order, noted one by one, gone on with after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from moe_bench.errors import BadInputError
from moe_bench.launch.campaign import TIMED_OUT, Due, command_of, run_campaign, run_logged
from moe_bench.launch.local import torchrun
from moe_bench.results.campaign import (
    CampaignHeader,
    CampaignJournal,
    Step,
    StepOutcome,
    campaign_folder,
    read_campaign,
)
from moe_bench.results.journal import unfinished_journals
from moe_bench.results.record import GitState

HEADER = CampaignHeader(
    is_tiny=True,
    started_at="2026-11-22T07:00:00+00:00",
    command=("moe-bench", "h100"),
    job_id="pid1",
    git=GitState(commit="0123456789abcdef", branch="main", is_dirty=False),
    packages={"torch": "2.15.0"},
    gpu_name="cpu",
    driver_version=None,
    budget_s=None,
)


def due(key: str, *, estimated_s: float = 1.0, absent: str | None = None) -> Due:
    step = Step(key=key, question="none", arguments=(key,))
    return Due(step=step, estimated_s=estimated_s, limit_s=60.0, absent=absent)


def ran(
    root: Path,
    journal: CampaignJournal,
    steps: Sequence[Due],
    *,
    budget_s: float | None = None,
    retries: bool = False,
) -> tuple[list[str], int]:
    """Keys in the order in which they ran, and how many were left; `broken` fails, others write a file."""
    keys: list[str] = []

    def run(command: Sequence[str], log: Path, limit_s: float) -> int:
        key = command[3]
        keys.append(key)
        if key == "broken":
            log.write_text("a table\nrecipe.yaml:3: hidden: 7; use 8\n\n")
            return 2
        (root / f"{key}.json").touch()
        return 0

    num_left = run_campaign(
        steps,
        journal,
        root,
        run=run,
        budget_s=budget_s,
        retries=retries,
        on_start=lambda _: None,
        on_end=lambda _: None,
    )
    return keys, num_left


def test_every_step_is_noted_with_its_files_or_the_reason_why_it_has_none(tmp_path: Path) -> None:
    journal = CampaignJournal.start(tmp_path, HEADER)
    steps = [due("first"), due("broken"), due("third", absent="not installed: quack (pip install quack)")]
    assert ran(tmp_path, journal, steps) == (["first", "broken"], 0)
    campaign = read_campaign(journal.finish())
    assert [(one.exit_code, one.reason, one.files) for one in campaign.outcomes] == [
        (0, None, ("first.json",)),
        (2, "recipe.yaml:3: hidden: 7; use 8", ()),
        (None, "not installed: quack (pip install quack)", ()),
    ]
    assert unfinished_journals(campaign_folder(tmp_path, "cpu")) == ()


def test_the_reason_of_a_rank_is_its_own_word_and_not_torchruns_report(tmp_path: Path) -> None:
    start = torchrun(num_nodes=1, ranks_per_node=1, meet_at=("--standalone",))
    rank = (sys.executable, *start, "-m", "moe_bench", "run", "no_such_model")
    journal = CampaignJournal.start(tmp_path, HEADER)
    run_campaign(
        [due("a")],
        journal,
        tmp_path,
        run=lambda _, log, limit_s: run_logged(rank, log, limit_s),
        budget_s=None,
        on_start=lambda _: None,
        on_end=lambda _: None,
    )
    (outcome,) = journal.outcomes
    assert outcome.exit_code == 1
    assert "no_such_model" in str(outcome.reason)


def test_a_campaign_goes_on_behind_the_last_step_that_was_noted(tmp_path: Path) -> None:
    journal = CampaignJournal.start(tmp_path, HEADER)
    ran(tmp_path, journal, [due("first"), due("broken")])
    (path,) = unfinished_journals(campaign_folder(tmp_path, "cpu"))
    with path.open("ab") as file:
        file.write(b'{"step": {"key": "thi')
    resumed = CampaignJournal.resume(path, HEADER)
    assert ran(tmp_path, resumed, [due("first"), due("broken"), due("third")]) == (["third"], 0)
    assert resumed.done == {"first", "broken", "third"}


def test_a_step_that_failed_is_run_again_only_where_that_is_asked_for(tmp_path: Path) -> None:
    journal = CampaignJournal.start(tmp_path, HEADER)
    steps = [due("first"), due("broken")]
    ran(tmp_path, journal, steps)
    assert ran(tmp_path, journal, steps) == ([], 0)
    assert ran(tmp_path, journal, steps, retries=True) == (["broken"], 0)
    assert [one.step.key for one in read_campaign(journal.finish()).outcomes] == ["first", "broken"]


@pytest.mark.parametrize(
    "changed",
    [{"is_tiny": False}, {"gpu_name": "H200"}, {"driver_version": "575"}, {"packages": {"torch": "2.14.0"}}],
)
def test_two_states_of_a_machine_are_not_mixed(tmp_path: Path, changed: dict[str, object]) -> None:
    path = CampaignJournal.start(tmp_path, HEADER).path
    with pytest.raises(BadInputError, match="one file holds one state"):
        CampaignJournal.resume(path, HEADER.model_copy(update=changed))


def test_a_step_that_does_not_fit_the_budget_is_left_and_a_smaller_one_behind_it_runs(tmp_path: Path) -> None:
    journal = CampaignJournal.start(tmp_path, HEADER)
    steps = [due("long", estimated_s=1000.0), due("short"), due("absent", estimated_s=1000.0, absent="gone")]
    assert ran(tmp_path, journal, steps, budget_s=100.0) == (["short"], 1)
    assert journal.done == {"short", "absent"}


def test_a_step_is_a_process_of_this_interpreter_that_writes_below_the_root(tmp_path: Path) -> None:
    step = Step(key="a", question="none", arguments=("layer", "deepseek_v3"))
    assert command_of(step, tmp_path)[1:] == (
        "-m",
        "moe_bench",
        "layer",
        "deepseek_v3",
        "--out",
        str(tmp_path),
    )
    tests = Step(key="b", question="none", program="pytest", arguments=("-m", "gpu"))
    assert command_of(tests, tmp_path)[1:] == ("-m", "pytest", "-m", "gpu")


def test_a_step_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hanging = (
        "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    )
    assert run_logged((sys.executable, "-c", hanging), log, 3.0) == TIMED_OUT
    assert _has_ended(int(log.read_text()))


def test_a_step_ends_when_what_runs_the_campaign_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    step = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    code = (
        "import sys; from pathlib import Path; from moe_bench.launch.campaign import run_logged; "
        f"run_logged((sys.executable, '-c', {step!r}), Path({str(log)!r}), 600.0)"
    )
    process = subprocess.Popen((sys.executable, "-c", code))
    while not (log.exists() and log.read_text().endswith("\n")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert _has_ended(int(log.read_text()))


def _has_ended(pid: int) -> bool:
    for _ in range(500):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.01)
    return False


def test_an_outcome_is_done_only_where_its_command_ended_well() -> None:
    step = Step(key="a", question="none", arguments=("layer",))
    outcomes = [
        StepOutcome(step=step, exit_code=code, reason="r", started_at="now", wall_s=0.0, files=())
        for code in (0, 1, None)
    ]
    assert [outcome.is_done for outcome in outcomes] == [True, False, False]
