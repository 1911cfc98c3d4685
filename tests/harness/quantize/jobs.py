"""Quantisations of toys, on the ranks that a zygote forks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from moe_bench.cli.options import ScaleOption, plan_of
from moe_bench.harness.all_ranks import Place
from moe_bench.harness.quantize.program import Quantized, quantize_rank
from moe_bench.harness.workers import Seat
from moe_bench.results.quantization import PartSize
from moe_bench.spec.quantization import QuantizeJob, quantize_job
from moe_bench.spec.recipe import Recipe
from tests.harness.toys import ONE_PROCESS
from tests.harness.zygote import Zygote


def job_of(recipe: str, *changes: str, **asked: Any) -> QuantizeJob:
    plan = plan_of(recipe, scale=ScaleOption.SMOKE, num_gpus=None, changes=list(changes), rounds=True)
    defaults = {"experts_only": False, "arithmetic": "simulated", "data": None, "num_evaluation_batches": 1}
    asked = defaults | asked
    return quantize_job(plan, num_calibration_batches=1, **asked)


def with_recipe(job: QuantizeJob, **changes: Any) -> QuantizeJob:
    return job.model_copy(update={"plan": job.plan.model_copy(update={"recipe": changed(job, **changes)})})


def changed(job: QuantizeJob, **changes: Any) -> Recipe:
    return job.plan.recipe.model_copy(update=changes)


def alone(job: QuantizeJob) -> QuantizeJob:
    """The same in one process."""
    return with_recipe(job, parallel=job.plan.recipe.parallel.model_copy(update=ONE_PROCESS))


def quantized(zygote: Zygote, job: QuantizeJob, checkpoint: Path | None = None) -> Quantized:
    found = zygote.fork(job.plan.num_ranks, partial(work, job, checkpoint))[0]
    assert isinstance(found, Quantized)
    return found


def work(job: QuantizeJob, checkpoint: Path | None, seat: Seat) -> Quantized:
    place = Place(rendezvous=seat.rendezvous, listen_fd=seat.listen_fd, tell=seat.send)
    return quantize_rank(job, checkpoint, place)


def part(found: Quantized, ending: str) -> PartSize:
    (only,) = (one for one in found.report.parts if one.name.endswith(ending))
    return only
