"""The list of jobs counts the states, names every job whole, and says why below it."""

from pathlib import Path

from rich.console import Console

from moe_bench.launch.job_state import JobState
from moe_bench.launch.jobs import JobReport
from moe_bench.report.jobs_view import job_json, job_view, jobs_view

WHY = "[rank3]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.50 GiB. GPU 3 has a total"


def job(state: JobState, **changes: object) -> JobReport:
    fields = {
        "id": "4211",
        "recipe": "deepseek_v3/h100_sxm_1024g_bf16",
        "scale": "full",
        "modified": ("seed=1",),
        "num_ranks": 1024,
        "repeat": 2,
        "started_at": "2026-11-22T07:00:00+00:00",
        "state": state,
        "reason": "",
        "record": None,
        "log": None,
    }
    return JobReport(**fields | changes)  # type: ignore[arg-type]


def printed(view: object, width: int = 120) -> list[str]:
    console = Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(view)
    return [line.rstrip() for line in capture.get().splitlines()]


def test_states_are_counted_and_the_reason_stands_below_its_job() -> None:
    jobs = [job(JobState.RUNNING, id="4212"), job(JobState.OUT_OF_MEMORY, reason=WHY), job(JobState.RUNNING)]
    first, head, *lines = printed(jobs_view(jobs, num_hidden=7))
    assert first == "2 running, 1 out of memory; 7 older ones: --limit"
    assert head.split() == ["job", "state", "recipe", "ranks", "since", "(UTC)"]
    assert lines[1].startswith(
        "4211  out of memory  deepseek_v3/h100_sxm_1024g_bf16 (seed=1, repeat 2)   1024"
    )
    assert lines[2] == f"    {WHY}"
    assert len(lines) == 4


def test_a_narrow_terminal_folds_the_reason_and_cuts_no_name() -> None:
    _, head, line, *why, missing, _ = printed(
        jobs_view([job(JobState.OUT_OF_MEMORY, reason=WHY)], num_hidden=0), width=70
    )
    assert (head.split(), line.split()) == (["job", "state"], ["4211", "out", "of", "memory"])
    assert len(why) == 2
    assert "".join("".join(why).split()) == "".join(WHY.split())
    assert missing.startswith("not shown in 70 columns: recipe, ")


def test_without_jobs_the_list_says_so() -> None:
    assert printed(jobs_view([], num_hidden=0)) == ["no jobs"]


def test_one_job_is_shown_with_all_that_leads_to_it() -> None:
    found = job(
        JobState.DONE,
        record=Path("/r/one.json"),
        log=Path("/l/4211.out"),
        command=("sbatch", "a b"),
        job_size="128 nodes",
    )
    text = "\n".join(printed(job_view(found)))
    for wanted in ("done", "/r/one.json", "/l/4211.out", "sbatch 'a b'", "128 nodes", "seed=1, repeat 2"):
        assert wanted in text
    told = job_json(found)
    assert (told["state"], told["record"], told["log"]) == ("done", "/r/one.json", "/l/4211.out")
