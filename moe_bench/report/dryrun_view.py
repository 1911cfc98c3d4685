"""A dry run for people and for scripts: memory, operations, traffic and findings of each rank."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe_bench.analysis.memory import rank_memory
from moe_bench.harness.dryrun.outcome import DryRun, FlopsLine, RankDryRun, RankOutcome, TrafficLine
from moe_bench.report.figures import GIB
from moe_bench.report.recipe_list import layout_label
from moe_bench.report.show import substitution_table
from moe_bench.spec.recipe import Recipe

NOT_COMPARED = "unverified: no figure here has been compared with a GPU"
_BARS = "▁▂▃▄▅▆▇█"
_SPARK_COLUMNS = 100
_NUM_HOLDERS = 12
_NUMBER = re.compile(r"\.\d+\b")


def dry_run_view(run: DryRun) -> RenderableType:
    """What was built, then every rank."""
    plan = run.plan
    parts: list[RenderableType] = [
        Text(f"{plan.asked} on {plan.recipe.parallel.num_gpus} ranks, without data", style="bold"),
        Text(layout_label(plan.recipe), style="dim"),
        Text(NOT_COMPARED, style="yellow"),
    ]
    if plan.modified:
        parts.append(Text(f"modified: {', '.join(plan.modified)}", style="yellow"))
    parts += [Text(), substitution_table(plan.substitutions)]
    if len(run.ranks) > 1:
        parts += [Text(), _stages_table(run)]
    else:
        for outcome in run.ranks:
            parts += [Text(), *_rank_parts(plan.recipe, outcome)]
    parts += [Text(), _findings(run.ranks), Text(), _stand_ins(run.ranks[0].run)]
    return Group(*parts)


def dry_run_json(run: DryRun) -> dict[str, object]:
    """`dry_run_view` as JSON, line by line and with the units in the names."""
    return {
        "recipe": run.plan.asked,
        "is_compared_with_gpu": False,
        "modified": list(run.plan.modified),
        "substitutions": [row.model_dump() for row in run.plan.substitutions],
        "ranks": [
            {**dataclasses.asdict(outcome), "corrected_peak_bytes": outcome.corrected_peak_bytes}
            for outcome in run.ranks
        ],
    }


def _rank_parts(recipe: Recipe, outcome: RankOutcome) -> Iterable[RenderableType]:
    run = outcome.run
    yield Text(f"rank {run.rank}, pipeline rank {run.pipeline_rank}", style="bold")
    params = run.num_dense_params + run.num_expert_params
    yield Text(
        f"parameters: {params:,} ({run.num_dense_params:,} dense, {run.num_expert_params:,} routed experts)"
    )
    yield Text(f"micro batches: {run.num_micro_batches_run} run of {run.num_micro_batches}{_scaled(run)}")
    yield Text()
    yield _memory_table(recipe, outcome)
    yield _holders_table(run)
    yield Text()
    yield Text(f"memory over the step  {_spark(run.timeline_bytes)}", style="dim")
    yield Text()
    yield _flops_table(run.flops)
    yield Text()
    yield _traffic_table(run.traffic)
    yield Text()
    calls = ", ".join(f"{phase} {num:,}" for phase, num in run.num_operator_calls.items())
    yield Text(f"operators launched over the micro batches run: {calls}")


def _scaled(run: RankDryRun) -> str:
    if run.num_micro_batches_run == run.num_micro_batches:
        return ""
    return "; what every micro batch does alike is scaled to the whole step"


def _memory_table(recipe: Recipe, outcome: RankOutcome) -> Table:
    run, closed = outcome.run, rank_memory(recipe, outcome.run.pipeline_rank)
    table = _table("peak memory", "", "GiB", "closed form", right=(1, 2))
    formulas = closed.bytes_by_category
    for category, num_bytes in bytes_by_category(run).items():
        table.add_row(category, _gib(num_bytes), _gib(formulas.get(category, 0)))
    peak = run.peak
    table.add_row(
        f"all live tensors, {peak.phase} of {peak.module}", _gib(peak.num_bytes), _gib(closed.total_bytes)
    )
    for term in outcome.corrections:
        figure = "?" if term.num_bytes is None else f"{term.num_bytes / GIB:+,.2f}"
        table.add_row(f"  {term.term} (unverified)", figure, "", style="dim")
    table.add_row("as asked (unverified)", _gib(outcome.corrected_peak_bytes), "", style="bold")
    if recipe.system.gpu is not None:
        table.add_row(f"usable on {recipe.system.display_name}", _gib(recipe.system.gpu.usable_bytes), "")
    return table


def _holders_table(run: RankDryRun) -> Table:
    """What fills the rest of the peak, by the module that ran, all layers of a kind together."""
    table = _table(
        "held at the peak beside the states", "GiB", "category", "taken by", "layers", right=(0, 3)
    )
    sums: dict[tuple[str, str], list[int]] = defaultdict(list)
    for line in run.peak.bytes_by_owner:
        if line.category not in STATE_CATEGORIES:
            sums[line.category, _NUMBER.sub(".*", line.module)].append(line.num_bytes)
    largest = sorted(sums.items(), key=lambda item: -sum(item[1]))[:_NUM_HOLDERS]
    for (category, module), sizes in largest:
        table.add_row(_gib(sum(sizes)), category, module, str(len(sizes)))
    return table


def _stages_table(run: DryRun) -> Table:
    recipe = run.plan.recipe
    table = _table(
        "every pipeline rank",
        "rank", "pipeline", "parameters", "states GiB", "rest GiB", "peak GiB", "closed form", "as asked",
        "peak at", right=range(8),
    )  # fmt: skip
    for outcome in run.ranks:
        rank = outcome.run
        states = state_bytes(rank)
        table.add_row(
            str(rank.rank),
            str(rank.pipeline_rank),
            f"{rank.num_dense_params + rank.num_expert_params:,}",
            _gib(states),
            _gib(rank.peak.num_bytes - states),
            _gib(rank.peak.num_bytes),
            _gib(rank_memory(recipe, rank.pipeline_rank).total_bytes),
            f"{_gib(outcome.corrected_peak_bytes)}?",
            f"{rank.peak.phase} of {rank.peak.module}",
        )
    if recipe.system.gpu is not None:
        usable = _gib(recipe.system.gpu.usable_bytes)
        table.caption = f"usable: {usable} GiB; `?`: {NOT_COMPARED}"
        table.caption_justify = "left"
    return table


def state_bytes(run: RankDryRun) -> int:
    """Weights, gradients and optimizer states at the peak."""
    return sum(run.peak.bytes_by_category.get(name, 0) for name in STATE_CATEGORIES)


STATE_CATEGORIES = ("weights", "gradients", "optimizer states")
CATEGORIES = (
    *STATE_CATEGORIES,
    "inputs",
    "activations",
    "recomputed",
    "backward",
    "pipeline",
    "optimizer step",
    "synchronisation",
)
"""`moe_bench.harness.dryrun.accounting.Category`, states first."""


def _flops_table(lines: Sequence[FlopsLine]) -> Table:
    """Operations by kind and phase; recomputation on its own line."""
    table = _table(
        "TFLOPs per step", "kind", "forward", "backward", "recompute", right=(1, 2, 3),
        caption="attention: causal half, windows; its backward pass makes the scores again (5 products to 2)",
    )  # fmt: skip
    sums: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for line in lines:
        sums[line.kind][line.phase] += line.num_flops
    for kind, phases in sums.items():
        table.add_row(
            kind, *(f"{phases[phase] / 1e12:,.1f}" for phase in ("forward", "backward", "recompute"))
        )
    return table


def _traffic_table(lines: Sequence[TrafficLine]) -> Table:
    """Bytes by collective, group and phase, and how they spread over layers."""
    table = _table(
        "traffic per step", "collective", "group", "ranks", "phase", "calls", "GB", "GB per layer", "layers",
        right=(2, 4, 5, 6, 7),
        caption="all_gather: output; reduce_scatter, all_to_all: input, this rank's share included",
    )  # fmt: skip
    grouped: dict[tuple[str, str, int, str], list[TrafficLine]] = defaultdict(list)
    for line in lines:
        grouped[line.op, line.group, line.group_size, line.phase].append(line)
    for (op, group, size, phase), parts in grouped.items():
        total = sum(part.num_bytes for part in parts)
        layers = [part.num_bytes for part in parts if part.layer.startswith(("decoder.", "mtp."))]
        table.add_row(
            op,
            group,
            str(size),
            phase,
            f"{sum(part.num_calls for part in parts):,}",
            f"{total / 1e9:,.3f}",
            _span(layers),
            str(len(layers)) if layers else "",
        )
    return table


def _span(layers: Sequence[int]) -> str:
    if not layers:
        return ""
    least, most = (f"{num / 1e9:,.3f}" for num in (min(layers), max(layers)))
    return least if least == most else f"{least} to {most}"


def _findings(ranks: Sequence[RankOutcome]) -> RenderableType:
    table = _table("findings", "rank", "GiB", "what", "where", right=(0, 1))
    for outcome in ranks:
        for finding in outcome.run.findings:
            where = (
                finding.where if len(finding.where) <= 3 else (*finding.where[:2], "...", finding.where[-1])
            )
            table.add_row(str(outcome.run.rank), _gib(finding.num_bytes), finding.what, ", ".join(where))
    return table if table.row_count else Text("findings: none")


def _stand_ins(run: RankDryRun) -> Table:
    table = _table("kernels stood in for", "kernel", "keeps for the backward pass", "read in", "verified")
    for entry in run.stand_ins:
        table.add_row(entry.kernel, entry.keeps, entry.source, "yes" if entry.is_verified else "no")
    return table


def _table(title: str, *headings: str, right: Iterable[int] = (), caption: str | None = None) -> Table:
    table = Table(
        box=None, pad_edge=False, header_style="bold", title=title, title_justify="left", caption=caption,
        caption_justify="left",
    )  # fmt: skip
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index in set(right) else "left", overflow="fold")
    return table


def _spark(values: Sequence[int]) -> str:
    """The maxima of equal parts as bars between the least and the most."""
    if not values:
        return ""
    width = min(_SPARK_COLUMNS, len(values))
    edges = [index * len(values) // width for index in range(width + 1)]
    parts = [max(values[start:end]) for start, end in itertools.pairwise(edges)]
    low, high = min(parts), max(parts)
    scale = (len(_BARS) - 1) / (high - low or 1)
    return "".join(_BARS[round((part - low) * scale)] for part in parts)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:,.2f}"


def bytes_by_category(run: RankDryRun) -> Mapping[str, int]:
    """Categories of the peak, in one order for all ranks."""
    found = run.peak.bytes_by_category
    return {name: found[name] for name in CATEGORIES if name in found}
