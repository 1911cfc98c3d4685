"""Published rows whose own figures cannot all be true, and why, where the cause is known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from moe_bench.analysis.flops import RULES, FlopsCounting
from moe_bench.errors import Mistake, RecipeError
from moe_bench.results.flops_convention import CONVENTIONS
from moe_bench.results.published import PublishedRow, model_key
from moe_bench.results.renormalised import GIGA, flops_per_token
from moe_bench.spec.base import PositiveInt, Spec, Text
from moe_bench.spec.legality import Rule, attention, batches, experts, grid, layers
from moe_bench.spec.load import shown, validated
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.pipeline import LayoutError, expand_layout
from moe_bench.spec.recipe import Recipe
from moe_bench.spec.yaml_tree import read_yaml

TOLERANCE_FRACTION = 0.03
"""Distance between two figures of a row that rounding and run-to-run noise do not explain."""
_MATCH_FRACTION = 0.01
"""Distance at which a count is taken for the one that was really used."""

GRID_RULES: tuple[Rule, ...] = (
    grid.dense_grid,
    grid.expert_grid,
    batches.global_batch,
    layers.virtual_stages_need_a_pipeline,
)
"""Rules of sizes alone, whatever the model."""
MODEL_RULES: tuple[Rule, ...] = (attention.heads, attention.query_groups, experts.experts_per_rank)
"""Rules of sizes and a model that other engines than Megatron-Core obey as well."""
LAYOUT_RULES: tuple[Rule, ...] = (layers.layout_stages, layers.pipeline_layers, layers.mtp_stage)
"""Rules of a printed layout string. Without one, how layers were placed was not printed."""


class Check(StrEnum):
    """Figures that are held against each other."""

    FLOPS = "FLOPs per token"
    STEP = "tokens/s and step time"
    ACCUMULATION = "accumulation steps"
    LAYOUT = "layout"


class Fit(Spec):
    """A way of counting that gives what was printed."""

    counting: FlopsCounting
    head_dim: PositiveInt | None = None
    """Head size that was taken instead of the model's."""
    vocab_size: PositiveInt | None = None

    def flops_per_token(self, row: PublishedRow, model: ModelSpec) -> float | None:
        """What this way makes of `row`; None where it says nothing of it."""
        changes: dict[str, object] = {}
        if self.head_dim is not None:
            changes["attention"] = model.attention.model_copy(update={"head_dim": self.head_dim})
        if self.vocab_size is not None:
            changes["vocab_size"] = self.vocab_size
        return flops_per_token(row, model.model_copy(update=changes), self.counting)


class Known(Spec):
    """A cause that is known, and the rows that it explains."""

    check: Check
    rows: tuple[Text, ...]
    cause: Text
    source: Text
    fits: Fit | None = None
    """The count that was used; None for contradictions of another kind."""


class _KnownFile(Spec):
    known: tuple[Known, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contradiction:
    """Two figures of one row that cannot both be true."""

    row_id: str
    check: Check
    problem: str
    known: Known | None
    """Why, where somebody found out."""


def load_known(path: Path) -> tuple[Known, ...]:
    """The causes in `results/published/known/contradictions.yaml`; RecipeError names every mistake in it."""
    return validated(read_yaml(path, shown_as=shown(path)), _KnownFile).known


def contradictions(
    rows: Iterable[PublishedRow], templates: Mapping[str, Recipe], known: Iterable[Known]
) -> tuple[Contradiction, ...]:
    """Every contradiction within a row, in the order of `rows`.

    `templates` maps a model's key to any recipe of that model; a row of another model is checked without its
    architecture. Raises RecipeError where `known` explains something that is no contradiction.
    """
    causes = {(row_id, entry.check): entry for entry in known for row_id in entry.rows}
    found = tuple(
        Contradiction(row_id=row.id, check=check, problem=problem, known=causes.get((row.id, check)))
        for row in rows
        for check, problem in _found(row, templates)
    )
    stale = sorted(set(causes) - {(one.row_id, one.check) for one in found})
    if stale:
        raise RecipeError(tuple(_stale(row_id, check) for row_id, check in stale))
    return found


def _stale(row_id: str, check: Check) -> Mistake:
    return Mistake(
        file="contradictions.yaml",
        line=1,
        key=row_id,
        problem=f"the row does not contradict itself in {check}",
        fix="take it out of `rows`",
    )


def _found(row: PublishedRow, templates: Mapping[str, Recipe]) -> Iterator[tuple[Check, str]]:
    template = templates.get(model_key(row.model))
    if template is not None:
        yield from ((Check.FLOPS, problem) for problem in _flops_problems(row, template))
    distance = row.inconsistency_fraction
    if distance is not None and distance > TOLERANCE_FRACTION:
        printed, from_step = row.printed_tokens_per_s_per_gpu, row.tokens_per_s_per_gpu_from_step
        yield (
            Check.STEP,
            f"prints {printed:,.4g} tokens/s/GPU; its step time and batch give {from_step:,.4g}",
        )
    yield from ((Check.ACCUMULATION, problem) for problem in _accumulation_problems(row))
    any_template = template or next(iter(templates.values()))
    yield from (
        (Check.LAYOUT, problem) for problem in _layout_problems(row, any_template, template is not None)
    )


def _flops_problems(row: PublishedRow, template: Recipe) -> Iterator[str]:
    """The count that TFLOPs over tokens/s imply, against the one that the source means."""
    if row.flops_convention is None or row.implied_flops_per_token is None:
        return
    convention = CONVENTIONS[row.flops_convention]
    counting = convention.meant or convention.counting
    expected = None if counting is None else flops_per_token(row, template.model, counting)
    if expected is None:
        return
    implied = row.implied_flops_per_token
    if abs(implied / expected - 1) <= TOLERANCE_FRACTION:
        return
    problem = (
        f"implies {implied / GIGA:.1f} GFLOPs per token; counted as {counting} it is {expected / GIGA:.1f} "
        f"({implied / expected - 1:+.0%})"
    )
    matching = [
        str(other)
        for other in RULES
        if (count := flops_per_token(row, template.model, other)) is not None
        and abs(implied / count - 1) <= _MATCH_FRACTION
    ]
    if matching:
        problem += f"; it fits {' or '.join(matching)}"
    yield problem


def _accumulation_problems(row: PublishedRow) -> Iterator[str]:
    """GBS = accumulation steps x sequences per step and rank x DP; some suites count local batches."""
    per_step = row.local_batch or row.mbs
    if row.ga is None or row.gbs is None or per_step is None or row.data_parallel is None:
        return
    expected = row.gbs / (per_step * row.data_parallel)
    if row.ga != expected:
        yield (
            f"prints {row.ga} accumulation steps; {row.gbs} sequences / ({per_step} x DP{row.data_parallel}) "
            f"are {expected:g}"
        )


def _layout_problems(row: PublishedRow, template: Recipe, knows_model: bool) -> Iterator[str]:
    if row.num_gpus is None or row.tp is None or row.pp is None:
        return
    try:
        recipe = _as_recipe(row, template)
    except LayoutError as error:
        yield str(error).partition(";")[0]
        return
    rules = GRID_RULES + (MODEL_RULES if knows_model else ())
    if knows_model and row.layout is not None:
        rules += LAYOUT_RULES
    for rule in rules:
        yield from (problem.problem for problem in rule.problems(recipe))


def _as_recipe(row: PublishedRow, template: Recipe) -> Recipe:
    """`template` with the sizes that `row` prints; a size that is not printed is 1, as sources mean it."""
    stages = () if row.layout is None else expand_layout(row.layout)
    pipeline = row.pp or 1
    parallel = ParallelSpec(
        num_gpus=row.num_gpus or 1,
        tensor=row.tp or 1,
        pipeline=pipeline,
        virtual_pipeline=row.vpp or max(1, len(stages) // pipeline),
        layout=row.layout,
        context=row.cp or 1,
        expert=row.ep or 1,
        expert_tensor=row.etp or 1,
    )
    num_layers = row.num_layers or template.model.num_layers
    has_batch = row.gbs is not None and row.mbs is not None
    return template.model_copy(
        update={
            "model": template.model.model_copy(update={"num_layers": num_layers}),
            "parallel": parallel,
            "micro_batch_size": row.mbs if has_batch else 1,
            # a batch that is not printed is one that divides
            "global_batch_size": row.gbs if has_batch else parallel.data,
            "num_mtp_layers": "".join(stages).count("m"),
        }
    )
