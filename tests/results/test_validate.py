"""A record that contradicts itself is found, with the field; one that does not is left alone."""

from pathlib import Path
from typing import Any

import pytest

from moe_bench.results.entry import entry_of
from moe_bench.results.record import Record
from moe_bench.results.store import write_record
from moe_bench.results.summary import read_summary
from moe_bench.results.validate import duplicate_problems, file_problems, record_problems
from tests.results.records import record


def with_samples(**changes: Any) -> Record:
    samples = record().samples.model_copy(update=changes)
    return record().model_copy(update={"samples": samples})


def test_a_sound_record_has_no_problem(tmp_path: Path) -> None:
    assert file_problems(write_record(tmp_path, record())) == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"losses": (6.3, 6.2)}, "samples.losses: 2 values, there are 4 steps"),
        ({"losses": (6.3, float("nan"), 6.1, 6.0)}, "samples.losses: not finite"),
        ({"tokens_per_expert": ()}, "samples.tokens_per_expert: 0 values, there are 3 steps"),
        ({"peak_memory_bytes": (1,)}, "samples.peak_memory_bytes: 1 values, there are 2 ranks"),
        ({"energy_j": (1.0,)}, "samples.energy_j: 1 values, there are 2 ranks"),
        ({"step_times_s": ((0.1, 0.1, 0.1), (0.1, 0.1))}, "samples.step_times_s: ranks differ"),
        ({"step_times_s": ((0.1, 0.0, 0.1),) * 2}, "samples.step_times_s: a time that is none"),
        ({"step_times_s": ()}, "samples.step_times_s: no ranks"),
        ({"step_times_s": ((0.1, 0.1, 0.1),) * 3}, "samples.step_times_s: 3 ranks, the plan has 2"),
    ],
)
def test_a_record_that_contradicts_itself_is_found(changes: dict[str, Any], words: str) -> None:
    assert any(problem.startswith(words) for problem in record_problems(with_samples(**changes)))


def test_loads_that_the_index_does_not_read_are_read_here(tmp_path: Path) -> None:
    path = write_record(tmp_path, record())
    path.write_text(path.read_text().replace("[10,30]", '[10,"x"]'))
    read_summary(path)
    (problem,) = file_problems(path)
    assert problem.startswith(f"{path}: samples.tokens_per_expert.0.0.1: ")


def test_a_run_that_is_there_twice_is_found(tmp_path: Path) -> None:
    path = write_record(tmp_path, record())
    write_record(tmp_path, record(repeat=1))
    copy = path.with_name("copy.json")
    copy.write_bytes(path.read_bytes())
    entries = [entry_of(read_summary(one), one) for one in sorted(path.parent.glob("*.json"))]
    assert list(duplicate_problems(entries)) == [f"{copy}: the same run as {path}; remove one"]
