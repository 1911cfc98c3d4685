"""A card of the page about one training run: what it trains, how far it is, and how its experts fare."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from moe_bench.report.health_view import MAX_ALARMS
from moe_bench.report.html.chart import Chart, Data
from moe_bench.report.html.facts import Fact, system_text
from moe_bench.report.html.training_charts import training_charts
from moe_bench.report.recipe_list import layout_label
from moe_bench.report.tables import run_title
from moe_bench.results.training_health import HealthLine
from moe_bench.results.training_run import TrainingRun
from moe_bench.spec.scale import Substitution


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCard:
    """One training run."""

    title: str
    facts: tuple[Fact, ...]
    charts: tuple[Chart, ...]
    alarms: Data | None
    """The last ones; None where there were none."""
    alarms_text: str
    """How many there were, or why that is not known."""
    substitutions: tuple[Substitution, ...]


def training_card(index: int, run: TrainingRun) -> TrainingCard:
    """The card of `run`; `index` makes the keys of its charts unique."""
    alarms = [alarm for line in run.health for alarm in line.alarms]
    shown = alarms[-MAX_ALARMS:]
    rows = tuple((str(alarm.step), alarm.layer, str(alarm.expert), alarm.what) for alarm in shown)
    return TrainingCard(
        title=run_title(run.job.plan),
        facts=tuple(_facts(run)),
        charts=tuple(training_charts(index, run.log, run.health)),
        alarms=Data(headings=("step", "layer", "expert", "alarm"), rows=rows) if rows else None,
        alarms_text=_alarms_text(len(alarms), run.health),
        substitutions=run.job.plan.substitutions,
    )


def _facts(run: TrainingRun) -> Iterable[Fact]:
    job, recipe = run.job, run.job.plan.recipe
    yield Fact(label="run", text=str(run.folder))
    yield Fact(label="system", text=system_text(recipe))
    yield Fact(label="layout", text=layout_label(recipe) or "DP1")
    taken = run.log[-1].step if run.log else 0
    yield Fact(label="steps", text=f"{taken:,} of {job.num_steps:,}")
    tokens = recipe.global_batch_size * recipe.seq_len
    yield Fact(label="tokens", text=f"{tokens:,} per step, {taken * tokens:,} so far")
    yield Fact(label="data", text=job.data)
    rate, peak = job.learning_rate, recipe.optimizer.learning_rate
    yield Fact(
        label="learning rate",
        text=f"peak {peak:g}, minimum {peak * rate.minimum_fraction:g}; "
        f"steps of warm-up {rate.num_warmup_steps:,}, until the minimum {rate.num_decay_steps:,}",
    )
    if job.lora_rank is not None:
        yield Fact(label="adapters", text=f"of attention, rank {job.lora_rank}; all else stays as it was")
    if run.log:
        yield Fact(label="last loss", text=f"{run.log[-1].loss:.4f} nats per token")
    held_out = [line for line in run.log if line.validation_loss is not None]
    if held_out:
        loss = held_out[-1].validation_loss or 0.0
        text = (
            f"{loss:.4f} nats per token, perplexity {math.exp(loss):,.2f}, after step {held_out[-1].step:,}"
        )
        yield Fact(label="validation", text=text)


def _alarms_text(num_alarms: int, health: tuple[HealthLine, ...]) -> str:
    if not health:
        return "Tokens per expert were not counted yet, or the model has no experts."
    if not num_alarms:
        return f"No alarms about experts up to step {health[-1].step:,}."
    hidden = num_alarms - MAX_ALARMS
    earlier = f"; {hidden:,} earlier ones are in health.jsonl alone" if hidden > 0 else ""
    return f"{num_alarms:,} alarm{'' if num_alarms == 1 else 's'} about experts{earlier}."
