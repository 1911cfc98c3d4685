"""The end of a job is read from lines as PyTorch, NCCL, slurmstepd and srun print them."""

from pathlib import Path

import pytest

from moe_bench.launch.job_log import log_end
from moe_bench.launch.job_state import JobState

OOM = JobState.OUT_OF_MEMORY
TORCH = (
    "[rank3]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.50 GiB. GPU 3 has a total "
    "capacity of 79.11 GiB of which 1.02 GiB is free. Including non-PyTorch memory, this process has 78.08 "
    "GiB memory in use."
)
TIME_LIMIT = "slurmstepd-n1: error: *** JOB 5 ON n1 CANCELLED AT 2026-11-22T10:07:18 DUE TO TIME LIMIT ***"
CANCELLED = "slurmstepd: error: *** JOB 12 ON n1 CANCELLED AT 2026-11-22T10:07:18 ***"
REQUEUED = "slurmstepd: error: *** JOB 12 ON n1 CANCELLED AT 2026-11-22T10:07:18 DUE TO JOB REQUEUE ***"


@pytest.mark.parametrize(
    ("line", "state"),
    [
        (TORCH, OOM),
        ("torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.", OOM),
        ("torch.AcceleratorError: CUDA error: out of memory", OOM),
        ("node1:81:92 [3] include/alloc.h:228 NCCL WARN Cuda failure 2 'out of memory'", OOM),
        ("Last error: Cuda failure 'out of memory'", OOM),
        (
            "RuntimeError: [enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)",
            OOM,
        ),
        (
            "slurmstepd: error: Detected 1 oom_kill event in StepId=123.0. Some of the step tasks have been "
            "OOM Killed.",
            OOM,
        ),
        (
            "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=9.batch. Some of your processes may "
            "have been killed by the cgroup out-of-memory handler.",
            OOM,
        ),
        ("srun: error: node001: task 3: Out Of Memory", OOM),
        (TIME_LIMIT, JobState.TIMED_OUT),
        ("slurmstepd: error: *** STEP 5.0 ON n1 CANCELLED AT 2026-11-22T10:07:18 DUE TO TIME LIMIT ***",
         JobState.TIMED_OUT),
        (CANCELLED, JobState.CANCELLED),
        ("peak memory  77.90 GiB (rank 3)", None),
        ("srun: error: n1: task 1: Killed", None),
    ],
)  # fmt: skip
def test_a_line_is_known(tmp_path: Path, line: str, state: JobState | None) -> None:
    path = tmp_path / "log"
    path.write_text(f"substitutions\n{line}\n\n")
    end = log_end(path)
    assert end is not None
    assert end.state is state
    assert line.startswith(end.line)


def test_a_rank_that_ran_out_of_memory_goes_before_the_time_that_the_others_waited(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(f"{TORCH}\nwaiting\n{TIME_LIMIT}\n")
    end = log_end(path)
    assert end is not None
    assert end.state is OOM


@pytest.mark.parametrize("between", [REQUEUED, "a node of job 12 was lost; the job is queued again"])
def test_an_earlier_life_does_not_count(tmp_path: Path, between: str) -> None:
    path = tmp_path / "log"
    path.write_text(f"{TORCH}\n{between}\nstep time 1 s\n")
    end = log_end(path)
    assert end is not None
    assert (end.state, end.line) == (None, "step time 1 s")


def test_only_the_end_of_a_large_log_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_bench.launch.job_log.MAX_READ_BYTES", 1000)
    path = tmp_path / "log"
    path.write_bytes(TORCH.encode() + b"\n" + b"x\n" * 500 + b"\xff the end\n")
    end = log_end(path)
    assert end is not None
    assert end.state is None
    assert end.line.endswith("the end")


def test_without_a_log_nothing_is_said(tmp_path: Path) -> None:
    assert log_end(tmp_path / "none") is None
