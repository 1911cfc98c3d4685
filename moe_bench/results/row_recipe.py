"""Which field of a recipe answers to which column of a published row, and where the two disagree."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import get_args

from moe_bench.results.published import PublishedRow, model_key
from moe_bench.spec.load import UnknownNameError
from moe_bench.spec.problem import Problem
from moe_bench.spec.recipe import Dispatcher, GraphModule, OffloadModule, Recipe, RecomputeModule, StateDtype
from moe_bench.spec.scale import Plan

Value = str | int | float | bool | frozenset[str] | None
Printed = str | int | float | bool | tuple[str, ...] | None

PRECISIONS = {
    "bf16": "BF16",
    "fp8_delayed": "FP8-delayed",
    "fp8_tensorwise": "FP8-current-scaling",
    "fp8_blockwise": "FP8-blockwise",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
}
"""A recipe's precision as sources print it; `fp32` and `fp8_rowwise` were never published."""

MEGATRON = "Megatron-Core"


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """One column of the registry that a recipe can express."""

    column: str
    """Name in `PublishedRow`; `optimizer.exp_avg` for a part of it."""
    fields: tuple[str, ...]
    """Paths in `Recipe` that decide it."""
    of_recipe: Callable[[Recipe], Value]
    """The recipe's value in the row's vocabulary."""
    of_row: Callable[[Printed], Value]
    """The printed value in a form that can be compared."""
    vocabulary: frozenset[str] | None
    """Every text that the recipe's side can take; None for numbers and switches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """A column in which a recipe is not what its row was."""

    column: str
    row: Value
    recipe: Value

    def __str__(self) -> str:
        return f"{self.column}: the row has {shown(self.row)}, the recipe {shown(self.recipe)}"


def disagreements(row: PublishedRow, recipe: Recipe) -> tuple[Disagreement, ...]:
    """Every column that `row` prints and in which `recipe` differs."""
    found = []
    for knob in KNOBS:
        printed = row_value(row, knob.column)
        if printed is None:
            continue
        of_row, of_recipe = knob.of_row(printed), knob.of_recipe(recipe)
        if not _agree(knob.column, of_row, of_recipe):
            found.append(Disagreement(column=knob.column, row=of_row, recipe=of_recipe))
    return tuple(found)


def row_problems(plan: Plan, rows_of: Callable[[str], Iterable[PublishedRow]]) -> tuple[Problem, ...]:
    """What is wrong with what the recipe of `plan` says of the row that it copies, among `rows_of` its model.

    A recipe that somebody changed or scaled need not be what it was made of, but that must be a row still.
    """
    recipe = plan.recipe
    if recipe.reproduces is None:
        fix = "name it in reproduces, or remove them"
        return (Problem(("differences",), "stated without a row", fix),) if recipe.differences else ()
    rows = {row.id: row for row in rows_of(recipe.model.key)}
    row = rows.get(recipe.reproduces)
    if row is None:
        error = UnknownNameError(f"published row of {recipe.model.key}", recipe.reproduces, sorted(rows))
        return (Problem(("reproduces",), error.problem, error.fix),)
    return () if plan.modified or recipe.origin is not None else drift_problems(row, recipe)


def drift_problems(row: PublishedRow, recipe: Recipe) -> tuple[Problem, ...]:
    """Where the recipe's `differences` are not exactly its disagreements with `row`; empty if they are."""
    found = {one.column: one for one in disagreements(row, recipe)}
    stated = {difference.field for difference in recipe.differences}
    problems = [
        Problem(
            ("differences",),
            f"{one} and no difference says so",
            f"add `field: {column}` with row, recipe and why, or copy the row",
        )
        for column, one in found.items()
        if column not in stated
    ]
    for index, difference in enumerate(recipe.differences):
        one = found.get(difference.field)
        if one is None:
            problem = f"{difference.field} does not differ from {row.id}"
            problems.append(Problem(("differences", index), problem, "remove the entry"))
        elif (difference.row, difference.recipe) != (shown(one.row), shown(one.recipe)):
            fix = f"write row: {shown(one.row)} and recipe: {shown(one.recipe)}"
            problems.append(Problem(("differences", index), "its values are not those of the two", fix))
    return tuple(problems)


def row_value(row: PublishedRow, column: str) -> Printed:
    """The printed value of a column, `optimizer.exp_avg` style paths included; None if it is not printed."""
    value: object = row
    for name in column.split("."):
        value = None if value is None else getattr(value, name)
    assert value is None or isinstance(value, str | int | float | bool | tuple)  # noqa: S101 - our own columns
    return value


def shown(value: Value) -> str:
    """A value as a table or an error shows it."""
    if isinstance(value, frozenset):
        return ", ".join(sorted(value)) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)


def _agree(column: str, of_row: Value, of_recipe: Value) -> bool:
    if column == "recompute" and of_row == "selective":
        return isinstance(of_recipe, frozenset)
    if column == "precision" and of_row == "FP8":
        return str(of_recipe).startswith("FP8")
    return of_row == of_recipe


def _hardware(recipe: Recipe) -> Value:
    return recipe.system.key.partition("_")[0].upper()


def _engine(framework: Printed) -> Value:
    """Frameworks that run Megatron-Core are one engine; Automodel, torchtitan and the rest are others."""
    names = ("Megatron", "MCore", "NeMo 2", "NeMo /")
    return MEGATRON if any(name in str(framework) for name in names) else str(framework)


def _sharding(recipe: Recipe) -> Value:
    return {"none": "none", "distributed_optimizer": "zero1", "megatron_fsdp": "fsdp"}[
        recipe.parallel.data_sharding
    ]


def _recompute(recipe: Recipe) -> Value:
    if recipe.recompute.granularity == "selective":
        return frozenset(recipe.recompute.modules)
    return recipe.recompute.granularity


def _recompute_num_layers(recipe: Recipe) -> Value:
    return recipe.recompute.num_layers if recipe.recompute.granularity == "full" else None


def _graph_modules(modules: Printed) -> Value:
    """`full_iteration` is the older spelling of an implementation, not a module."""
    return frozenset(modules) - {"full_iteration"} if isinstance(modules, tuple) else frozenset()


def _offload(recipe: Recipe) -> Value:
    if recipe.offload.optimizer_fraction:
        return "optimizer"
    if recipe.offload.num_activation_layers:
        return "activation_layers"
    return "fine_grained" if recipe.offload.modules else "none"


def _routing(recipe: Recipe) -> Value:
    return recipe.routing.mode in ("random_logits", "round_robin")


def _capacity(recipe: Recipe) -> Value:
    return recipe.token_drop.capacity_factor if recipe.token_drop else None


def _experts_backend(recipe: Recipe) -> Value:
    return {"transformer_engine": "te", "torch_native": "torch_mm", "quack": "quack"}[recipe.kernels.family]


def _schedule(recipe: Recipe) -> Value:
    return "interleaved1f1b" if recipe.parallel.virtual_pipeline > 1 else "1f1b"


def _optimizer_maker(recipe: Recipe) -> Value:
    return {"transformer_engine": "te", "torch_native": "torch", "quack": "torch"}[recipe.kernels.family]


def _num_shards(recipe: Recipe) -> Value:
    return recipe.parallel.dense_shards // recipe.parallel.num_optimizer_instances


def _words(annotation: object) -> frozenset[str]:
    return frozenset(get_args(annotation))


def _comparable(value: Printed) -> Value:
    return frozenset(value) if isinstance(value, tuple) else value


def _knob(
    column: str,
    *fields: str,
    of_recipe: Callable[[Recipe], Value] | None = None,
    of_row: Callable[[Printed], Value] = _comparable,
    vocabulary: frozenset[str] | None = None,
) -> Knob:
    """A knob whose recipe value is the one field named, unless `of_recipe` says how it follows."""
    read = of_recipe or attrgetter(fields[0])
    return Knob(column=column, fields=fields, of_recipe=read, of_row=of_row, vocabulary=vocabulary)


KNOBS: tuple[Knob, ...] = (
    _knob("model", "model", of_recipe=attrgetter("model.key"), of_row=lambda name: model_key(str(name))),
    _knob("num_layers", "model.num_layers"),
    _knob("hardware", "system", of_recipe=_hardware),
    _knob("framework", of_recipe=lambda recipe: MEGATRON, of_row=_engine),
    _knob("num_gpus", "parallel.num_gpus"),
    _knob(
        "precision",
        "precision",
        of_recipe=lambda recipe: PRECISIONS.get(recipe.precision, recipe.precision),
        vocabulary=frozenset(PRECISIONS.values()) | {"FP8"},
    ),
    _knob("seq_len", "seq_len"),
    _knob("mbs", "micro_batch_size"),
    _knob("gbs", "global_batch_size"),
    _knob("tp", "parallel.tensor"),
    _knob("pp", "parallel.pipeline"),
    _knob("vpp", "parallel.virtual_pipeline"),
    _knob("cp", "parallel.context"),
    _knob("ep", "parallel.expert"),
    _knob("etp", "parallel.expert_tensor"),
    _knob("layout", "parallel.layout"),
    _knob(
        "pipeline_schedule",
        "parallel.virtual_pipeline",
        of_recipe=_schedule,
        vocabulary=frozenset({"1f1b", "interleaved1f1b"}),
    ),
    _knob(
        "sharding",
        "parallel.data_sharding",
        "parallel.fsdp_strategy",
        of_recipe=_sharding,
        vocabulary=frozenset({"zero1", "fsdp"}),
    ),
    _knob("num_shards", "parallel.num_gpus", "parallel.num_optimizer_instances", of_recipe=_num_shards),
    _knob("dispatcher", "dispatch.dispatcher", vocabulary=_words(Dispatcher)),
    _knob("dispatcher_sms", "dispatch.num_sms"),
    _knob("permute_fusion", "kernels.fusions.permute"),
    _knob(
        "experts_backend",
        "kernels.family",
        of_recipe=_experts_backend,
        vocabulary=frozenset({"te", "torch_mm", "quack"}),
    ),
    _knob("ep_overlap", "overlap.expert_parallel"),
    _knob("delay_wgrad", "overlap.delayed_wgrad"),
    _knob("tp_comm_overlap", "overlap.tensor_parallel"),
    _knob(
        "recompute",
        "recompute.granularity",
        "recompute.modules",
        of_recipe=_recompute,
        vocabulary=_words(RecomputeModule) | {"none", "selective", "full"},
    ),
    _knob(
        "recompute_num_layers",
        "recompute.num_layers",
        "recompute.method",
        of_recipe=_recompute_num_layers,
    ),
    _knob(
        "cuda_graph",
        "cuda_graphs.implementation",
        vocabulary=frozenset({"none", "local", "transformer_engine", "full_iteration"}),
    ),
    _knob(
        "cuda_graph_modules",
        "cuda_graphs.modules",
        of_recipe=lambda recipe: frozenset(recipe.cuda_graphs.modules),
        of_row=_graph_modules,
        vocabulary=_words(GraphModule),
    ),
    _knob("paged_stash", "offload.paged_stash"),
    _knob(
        "offload",
        "offload.optimizer_fraction",
        "offload.num_activation_layers",
        "offload.modules",
        of_recipe=_offload,
        vocabulary=frozenset({"none", "optimizer", "activation_layers", "fine_grained"}),
    ),
    _knob("offload_num_layers", "offload.num_activation_layers"),
    _knob(
        "offload_modules",
        "offload.modules",
        of_recipe=lambda recipe: frozenset(recipe.offload.modules),
        vocabulary=_words(OffloadModule),
    ),
    _knob("mtp", "num_mtp_layers"),
    _knob("force_load_balance", "routing.mode", of_recipe=_routing),
    _knob("token_drop", "token_drop", of_recipe=lambda recipe: recipe.token_drop is not None),
    _knob("capacity_factor", "token_drop.capacity_factor", of_recipe=_capacity),
    _knob(
        "optimizer.name",
        "optimizer.name",
        # Megatron-Core's adam decays weights apart from the gradient, which others call adamw
        of_row=lambda name: "adam" if name == "adamw" else str(name),
        vocabulary=frozenset({"adam", "muon", "sgd"}),
    ),
    _knob(
        "optimizer.implementation",
        "kernels.family",
        of_recipe=_optimizer_maker,
        vocabulary=frozenset({"te", "torch"}),
    ),
    _knob("optimizer.main_params", "optimizer.main_params_dtype", vocabulary=frozenset({"fp32", "fp16"})),
    _knob("optimizer.main_grads", "optimizer.gradient_dtype", vocabulary=frozenset({"fp32", "bf16"})),
    _knob("optimizer.exp_avg", "optimizer.exp_avg_dtype", vocabulary=_words(StateDtype)),
    _knob("optimizer.exp_avg_sq", "optimizer.exp_avg_sq_dtype", vocabulary=_words(StateDtype)),
    _knob(
        "optimizer.clip_grad",
        "optimizer.clip_grad_norm",
        of_recipe=lambda recipe: recipe.optimizer.clip_grad_norm > 0,
    ),
)
"""Every column that describes how a run was laid out; `docs/registry.md` explains them."""
