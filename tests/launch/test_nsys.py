"""The command that puts a rank under Nsight Systems."""

from __future__ import annotations

import pytest

from moe_bench.errors import BadInputError, MissingRequirementError
from moe_bench.launch.nsys import nsys_command, require_nsys, runs_under_nsys, start_under_nsys
from moe_bench.spec.profile import Profile
from tests.results.records import full, smoke

PROFILE = Profile(tool="nsys", num_steps=2, stem="results/run")


def test_the_rank_runs_again_under_nsys_with_its_own_file() -> None:
    command = nsys_command(PROFILE, 64, run_args=("qwen3_30b_a3b", "--profile", "nsys"), python="python")
    assert " ".join(command) == (
        "nsys profile --trace=cuda,nvtx --sample=none --cpuctxsw=none "
        "--capture-range=cudaProfilerApi --capture-range-end=stop --output=results/run-rank64.nsys-rep "
        "python -m moe_bench run qwen3_30b_a3b --profile nsys --traced results/run"
    )


def test_an_nsys_that_somebody_started_is_known_by_its_session() -> None:
    assert runs_under_nsys({"NSYS_PROFILING_SESSION_ID": "7"})
    assert not runs_under_nsys({"PATH": "/usr/bin"})


def test_the_process_is_replaced() -> None:
    started: list[str] = []
    start_under_nsys(PROFILE, 0, run_args=("m",), execute=lambda name, command: started.append(name))
    assert started == ["nsys"]


def test_without_a_gpu_and_without_nsys_there_is_no_trace() -> None:
    with pytest.raises(BadInputError, match="this run has no GPU; use torch"):
        require_nsys(smoke())
    with pytest.raises(MissingRequirementError, match="--profile nsys: not on PATH"):
        require_nsys(full(), which=lambda name: None)
    require_nsys(full(), which=lambda name: f"/usr/bin/{name}")
