"""A published training row as a complete recipe: what it prints, and what stated rules make of the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

from moe_bench.projection.rows.case import Case, Draft, Rule
from moe_bench.projection.rows.folds import FoldBy, configuration_key, fold_of
from moe_bench.projection.rows.printed import LAYOUT, printed_fields
from moe_bench.projection.rows.rules import RECIPE_RULE, STAGES
from moe_bench.projection.rows.stack import Stack, stack_of
from moe_bench.projection.rows.target import Target, target_of
from moe_bench.results.published import PublishedRow
from moe_bench.spec.base import Spec
from moe_bench.spec.catalogue import SYSTEMS_FOLDER, model_of_row, recipe_paths
from moe_bench.spec.load import Loader, UnknownNameError
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.recipe import Recipe
from moe_bench.spec.system import SystemSpec

_SPLIT_FIELDS = (
    "layout",
    "embedding_counts_as_layer",
    "loss_counts_as_layer",
    "num_layers_first_stage",
    "num_layers_last_stage",
)
_SYSTEM_FORMS = ("", "_sxm", "_nvl72")
"""What the key of a system adds to the name that sources print."""
_VARIANT = "published"
"""Suffix of the recipe's name, so that it cannot be taken for one of the catalogue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumption:
    """One field that the row does not print."""

    field: str
    """Dotted name in `Recipe`."""
    value: str
    rule: str
    """Name of the rule in `row_rules.RULES`, or `recipe` where a recipe that reproduces the row says it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InferredRun:
    """A row that can be projected."""

    row: PublishedRow
    recipe: Recipe
    stack: Stack
    target: Target
    assumptions: tuple[Assumption, ...]

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """The published throughput."""
        return self.target.tokens_per_s_per_gpu

    @property
    def configuration(self) -> str:
        """Equal for rows that repeat one configuration in another release."""
        return configuration_key(self.row)

    def fold(self, by: FoldBy) -> str:
        """The group that a cross-validation leaves out together with this run."""
        return fold_of(self.row, by)

    @property
    def step_time_s(self) -> float:
        """The published throughput as the time of one step."""
        per_gpu = self.recipe.tokens_per_step / self.recipe.parallel.num_gpus
        return per_gpu / self.tokens_per_s_per_gpu


@dataclass(frozen=True, slots=True, kw_only=True)
class Configured:
    """A row as a complete recipe, whether or not it states a throughput."""

    row: PublishedRow
    recipe: Recipe
    stack: Stack
    assumptions: tuple[Assumption, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NotProjectable:
    """A row that cannot be projected, and why."""

    row: PublishedRow
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """What rows name: models, systems, and the recipes that copy a row."""

    model: Callable[[str, int | None], ModelSpec | None]
    """By printed name, cut to a number of layers where one is given; None for an unknown one."""
    system: Callable[[str], SystemSpec | None]
    """By key; None for an unknown one."""
    reproducing: Callable[[str], Recipe | None]
    """By id of the row; None where no recipe copies it, the last one where several do."""


def load_catalogue(root: Path) -> Catalogue:
    """The catalogue in the folder `recipes/`, of which a file is checked when a row needs it.

    What it holds raises RecipeError with every mistake in such a file.
    """
    loader = Loader(root=root, rules=())
    texts = {path: path.read_bytes() for path in reversed(recipe_paths(root))}

    @cache
    def system(key: str) -> SystemSpec | None:
        return loader.system(key) if (root / SYSTEMS_FOLDER / f"{key}.yaml").is_file() else None

    @cache
    def reproducing(row_id: str) -> Recipe | None:
        # a file without the id does not copy the row, and checking all of them takes a tenth of `project`
        recipes = (loader.recipe(path) for path, text in texts.items() if row_id.encode() in text)
        return next((recipe for recipe in recipes if recipe.reproduces == row_id), None)

    @cache
    def model(name: str, num_layers: int | None) -> ModelSpec | None:
        try:
            return model_of_row(name, loader, num_layers=num_layers)
        except UnknownNameError:
            return None

    return Catalogue(model=model, system=system, reproducing=reproducing)


def infer(row: PublishedRow, catalogue: Catalogue) -> InferredRun | NotProjectable:
    """`row` as a complete recipe, with every assumption, or why that is impossible.

    The recipe satisfies the schema; whether it is legal is for `spec.legality` to say, since what ran on
    another engine need not be legal for Megatron-Core.
    """
    if not row.is_training:
        return NotProjectable(row=row, reason="no training of a whole model from scratch")
    case = _case(row, catalogue)
    if isinstance(case, NotProjectable):
        return case
    target = target_of(row, case.model, case.system)
    if target is None:
        return NotProjectable(row=row, reason="no throughput")
    made = _configured(case, catalogue)
    if isinstance(made, NotProjectable):
        return made
    return InferredRun(
        row=row, recipe=made.recipe, stack=case.stack, target=target, assumptions=made.assumptions
    )


def configured(row: PublishedRow, catalogue: Catalogue) -> Configured | NotProjectable:
    """`infer` for a row without throughput: one of memory, or of a run that failed."""
    case = _case(row, catalogue)
    return case if isinstance(case, NotProjectable) else _configured(case, catalogue)


def _case(row: PublishedRow, catalogue: Catalogue) -> Case | NotProjectable:
    model = catalogue.model(row.model, row.num_layers)
    if model is None:
        return NotProjectable(row=row, reason=f"no architecture facts of {row.model}")
    system = _system(row, catalogue)
    if system is None or system.gpu is None:
        return NotProjectable(row=row, reason=f"no system file of {row.hardware}")
    return Case(row=row, stack=stack_of(row), model=model, system=system, draft=printed_fields(row))


def _configured(case: Case, catalogue: Catalogue) -> Configured | NotProjectable:
    fields = _fields_of(case, catalogue.reproducing(case.row.id))
    if isinstance(fields, str):
        return NotProjectable(row=case.row, reason=fields)
    draft, assumptions = fields
    recipe = _recipe(draft, case.model, case.system)
    return Configured(row=case.row, recipe=recipe, stack=case.stack, assumptions=assumptions)


def _fields_of(case: Case, donor: Recipe | None) -> tuple[Draft, tuple[Assumption, ...]] | str:
    """Every field by dotted name with the assumptions, or what is missing."""
    draft = dict(case.draft)
    assumptions = []
    for rules, required in STAGES:
        for field in dict.fromkeys(rule.field for rule in rules):
            if field in draft:
                continue
            now = replace(case, draft=draft)
            rule = _rule_for(now, [rule for rule in rules if rule.field == field], donor)
            if rule is None and donor is None:
                continue
            value = _donated(donor, field) if rule is None else rule.value(now)
            draft[field] = value
            name = RECIPE_RULE if rule is None else rule.name
            assumptions.append(Assumption(field=field, value=_shown(value), rule=name))
        missing = next((reason for field, reason in required if field not in draft), None)
        if missing is not None:
            return missing
    return draft, tuple(assumptions)


def _rule_for(case: Case, rules: Sequence[Rule], donor: Recipe | None) -> Rule | None:
    """The rule that fills the field of `rules`; None where a recipe does, or nothing."""
    eligible = (rule for rule in rules if donor is None or rule.is_of_release)
    return next((rule for rule in eligible if rule.applies(case)), None)


def _system(row: PublishedRow, catalogue: Catalogue) -> SystemSpec | None:
    """The system that a source calls `H100`, `H100-96GB` or `GB200`."""
    key = (row.hardware or "").lower().replace("-", "_").replace(" ", "_")
    forms = (catalogue.system(key + form) for form in _SYSTEM_FORMS)
    return next((system for system in forms if system is not None), None)


def _donated(donor: Recipe | None, field: str) -> object:
    """The field of a recipe that copies the row; how it places layers is one field here."""
    assert donor is not None  # noqa: S101 - a field without a rule is filled by a recipe
    if field != LAYOUT:
        return attrgetter(field)(donor)
    split = donor.parallel.model_dump(include=set(_SPLIT_FIELDS), exclude_defaults=True)
    return {**split}


def _shown(value: object) -> str:
    if isinstance(value, Spec):
        value = value.model_dump(exclude_defaults=True, mode="json")
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_shown(part)}" for key, part in value.items()) or "none"
    if isinstance(value, list | tuple):
        return "+".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)


def _recipe(draft: Draft, model: ModelSpec, system: SystemSpec) -> Recipe:
    tree: dict[str, Any] = {"model": model, "system": system, "variant": _VARIANT}
    for field, value in draft.items():
        *parents, name = field.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        if field == LAYOUT and isinstance(value, Mapping):
            node.update(value)
        else:
            node[name] = value
    return Recipe.model_validate(tree)
