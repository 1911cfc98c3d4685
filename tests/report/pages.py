"""Made-up results with everything that the page can draw, and how many marks each of its charts must have."""

import math
import random
from functools import cache
from pathlib import Path

from moe_bench.analysis.memory import memory_fit
from moe_bench.projection.forecast import forecast
from moe_bench.projection.schedule.simulation import ChunkTime, ScheduleKind
from moe_bench.report.html.memory_chart import memory_parts
from moe_bench.report.html.page import ReportData
from moe_bench.report.html.pipeline_picture import pipeline_picture
from moe_bench.report.html.waterfall_chart import waterfall_chart
from moe_bench.report.scaling import Kind, ScalingPoint, missing_point, recipe_subject
from moe_bench.results.published import load_rows
from moe_bench.results.record import Record
from moe_bench.results.training_health import AlarmWatch, HealthLine, LayerHealth
from moe_bench.results.training_log import LogLine
from moe_bench.results.training_run import TrainingRun
from moe_bench.spec.catalogue import data_root, find_recipe
from moe_bench.spec.derive_training import Wishes, training_job
from moe_bench.spec.family import scaled_recipe
from moe_bench.spec.recipe import Recipe
from moe_bench.spec.scale import full_plan, smoke_plan
from tests.projection.schedule.simulate import simulate
from tests.results.records import LOADER, record

NUM_STEPS = 24
NUM_LAYERS, NUM_EXPERTS = 4, 16


@cache
def recipe(name: str) -> Recipe:
    return LOADER.recipe(find_recipe(name, LOADER))


def run(name: str, step_s: float, *, started_at: str, job_id: str = "job1", scale: str = "full") -> Record:
    """A run whose first steps are slow, whose 20th is an outlier, and whose experts are loaded unevenly."""
    noise = random.Random(job_id)
    asked = recipe(name)
    plan = full_plan(asked, modified=())
    if scale == "smoke":
        plan = smoke_plan(asked, host=LOADER.system("cpu_host"), modified=())
    num_ranks = plan.recipe.parallel.num_gpus
    levels_s = [step_s * noise.gauss(1, 0.002) * (1 + 0.4 * 0.3**step) for step in range(NUM_STEPS)]
    levels_s[19] *= 1.2
    times_s = tuple(
        tuple(level_s * (1 - abs(noise.gauss(0, 0.003))) for level_s in levels_s) for _ in range(num_ranks)
    )
    made = record(plan, step_times_s=times_s, started_at=started_at, job_id=job_id)
    weights = [[math.exp(noise.gauss(0, 0.3)) for _ in range(NUM_EXPERTS)] for _ in range(NUM_LAYERS)]
    tokens = tuple(
        tuple(tuple(round(1000 * weight * noise.gauss(1, 0.05)) for weight in layer) for layer in weights)
        for _ in range(NUM_STEPS)
    )
    samples = made.samples.model_copy(update={"tokens_per_expert": tokens})
    return made.model_copy(update={"samples": samples})


def training_run(*, num_steps: int = 12, num_steps_per_window: int = 2) -> TrainingRun:
    """A smoke run whose loss falls, with two layers; expert 3 of the second gets no token from step 5 on."""
    plan = smoke_plan(recipe(QWEN), host=LOADER.system("cpu_host"), modified=("steps.seed=7",))
    job = training_job(
        plan, Wishes(data="data/moby", num_steps=num_steps, alarm_dead_steps=4, health_every=2), before=None
    )
    log = tuple(
        LogLine(
            step=step,
            loss=2 + 4 / step,
            grad_norm=1.0,
            learning_rate=1e-3,
            validation_loss=2.5 + 4 / step if step % 4 == 0 else None,
        )
        for step in range(1, num_steps + 1)
    )
    watch = AlarmWatch(job.health)
    windows = tuple(
        watch.judged(
            HealthLine(
                step=step,
                num_steps=num_steps_per_window,
                layers=(
                    _layer("decoder.1", 10, 10, 10, 10),
                    _layer("decoder.2", 10, 10, 10, 10 if step < 5 else 0),
                ),
            )
        )
        for step in range(num_steps_per_window, num_steps + 1, num_steps_per_window)
    )
    return TrainingRun(folder=Path("runs/first"), job=job, log=log, health=windows)


def _layer(name: str, *tokens: int) -> LayerHealth:
    return LayerHealth(layer=name, top_k=2, num_tokens=20, tokens_per_expert=tokens, expert_bias_range=None)


QWEN, DEEPSEEK = "qwen3_30b_a3b/h100_sxm_16g_bf16", "deepseek_v3/h100_sxm_256g_bf16"


@cache
def full_page() -> ReportData:
    """Two recipes: one with two full-scale runs, a projection and pictures, one with a smoke run."""
    qwen = recipe(QWEN)
    passes = ChunkTime(forward_s=0.01, dgrad_s=0.012, wgrad_s=0.008)
    picture = simulate(
        ScheduleKind.ZERO_BUBBLE_H1,
        num_ranks=4,
        num_virtual=1,
        num_micro_batches=8,
        micro_batch_group_size=4,
        chunks=[passes] * 4,
        transfer_s=0.0,
        overlaps_transfer=True,
    )
    return ReportData(
        records=(
            run(QWEN, 19.9, started_at="2026-11-20T10:00:00+00:00"),
            run(QWEN, 19.8, started_at="2026-11-20T11:00:00+00:00", job_id="job2"),
            run(DEEPSEEK, 0.5, started_at="2026-11-20T09:00:00+00:00", scale="smoke"),
        ),
        training=(training_run(),),
        recipes=(qwen, recipe(DEEPSEEK), recipe("mixtral_8x22b")),
        rows=load_rows(data_root() / "results" / "published"),
        version="0.0.0-test",
        missing=(
            missing_point(
                full_plan(scaled_recipe(qwen, 64, strong=False), modified=()),
                "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB on rank 3",
            ),
        ),
        projected=(
            ScalingPoint(
                kind=Kind.PROJECTED,
                subject=recipe_subject(qwen),
                family="projection",
                label=QWEN,
                num_gpus=16,
                global_batch_size=1024,
                layout="EP16",
                tokens_per_s_per_gpu=12_500.0,
            ),
        ),
        pipeline_pictures={QWEN: pipeline_picture("picture", picture)},
        waterfalls={QWEN: waterfall_chart("waterfall", forecast(qwen))},
    )


def expected_marks(data: ReportData) -> dict[str, int]:
    """Data points of each chart that follows from one record or recipe alone, by the chart's key."""
    smoke, newest = data.records[2], data.records[1]
    counts = {"loss-0": 12 + 3, "entropy-0": 6, "training-experts-0": 2 * 4}
    for index, one in enumerate((newest, smoke)):
        counts |= {
            f"steps-{index}": NUM_STEPS,
            f"peak-{index}": one.num_ranks,
            f"experts-{index}": NUM_LAYERS * NUM_EXPERTS,
            f"load-{index}": NUM_STEPS,
        }
    for index, one in enumerate(data.recipes):
        sizes = [size for rank in memory_fit(one).ranks for size in memory_parts(rank).values()]
        counts[f"memory-{index}"] = sum(size > 0 for size in sizes)
    return counts
