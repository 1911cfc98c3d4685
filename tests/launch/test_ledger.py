"""What was submitted is kept, whoever writes at the same time."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moe_bench.errors import BadInputError
from moe_bench.launch.ledger import LEDGER, SubmittedJob, add_to_ledger, read_ledger
from moe_bench.spec.scale import full_plan
from tests.launch.conftest import recipe_of


def submitted(job_id: int = 7) -> SubmittedJob:
    return SubmittedJob(
        job_id=job_id,
        cluster="eos",
        submitted_at="2026-11-22T10:00:00+00:00",
        plan=full_plan(recipe_of(), modified=()),
        repeat=0,
        job_size="2 nodes x 8 GPUs",
        time_limit_s=3600,
        log=f"/home/slurm-{job_id}.out",
        command=("sbatch", "run_recipe.sh"),
    )


def test_jobs_are_read_back_in_the_order_of_submission(tmp_path: Path) -> None:
    root = tmp_path / "results"
    assert list(read_ledger(root)) == []
    for job_id in (9, 7):
        add_to_ledger(root, submitted(job_id))
    assert list(read_ledger(root)) == [submitted(9), submitted(7)]


def test_submitters_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda job_id: add_to_ledger(tmp_path, submitted(job_id)), range(1, 65)))
    assert sorted(job.job_id for job in read_ledger(tmp_path)) == list(range(1, 65))


def test_a_line_that_was_changed_is_named(tmp_path: Path) -> None:
    add_to_ledger(tmp_path, submitted())
    with (tmp_path / LEDGER).open("a") as file:
        file.write('{"job_id": 0}\n')
    with pytest.raises(BadInputError, match=r"submitted\.jsonl:2: job_id: Input should be greater"):
        list(read_ledger(tmp_path))


def test_a_job_is_called_as_its_record_calls_it() -> None:
    # harness/measure.py writes `job<number>`
    assert submitted(123).record_job_id == "job123"
