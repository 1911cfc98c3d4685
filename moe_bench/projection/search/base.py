"""What a search keeps fixed: a recipe of the model on the system asked for, or stated defaults."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import yaml

from moe_bench.errors import BadInputError
from moe_bench.projection.search.layout import FOLLOWS
from moe_bench.spec.catalogue import find_recipe, recipe_paths, reference_model_keys
from moe_bench.spec.kernel_family import with_kernels
from moe_bench.spec.load import Loader
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.recipe import (
    DispatchSpec,
    Fusions,
    KernelSpec,
    Overlap,
    Precision,
    Recipe,
    Routing,
)
from moe_bench.spec.system import SystemSpec
from moe_bench.spec.yaml_tree import parse_value, parse_yaml

_DEFAULT_SEQ_LEN = 4096
_DEFAULTS = (
    "no recipe of this model: Transformer Engine with its fusions, a sharded optimizer, gradients and "
    "parameters overlapped, random balanced routing, BF16 unless asked otherwise"
)
_UNSPLIT = {
    "layout": None,
    "embedding_counts_as_layer": False,
    "loss_counts_as_layer": False,
    "num_layers_first_stage": 0,
    "num_layers_last_stage": 0,
    "micro_batch_group_size": 0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the user says about the job; None is left to the base."""

    model: str
    system: str
    num_gpus: int
    precision: str | None = None
    seq_len: int | None = None
    global_batch_size: int | None = None
    changes: tuple[str, ...] = ()
    """`key=value` texts."""

    @property
    def pinned(self) -> frozenset[str]:
        """Fields that the changes set."""
        return frozenset(change.partition("=")[0] for change in self.changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The recipe whose layout is searched, and where it comes from."""

    recipe: Recipe
    notes: tuple[str, ...]
    """In words: what was taken from where."""


def search_base(asked: Asked, loader: Loader) -> Base:
    """The recipe that every layout of a search is a variant of.

    That of the model on the system: in the precision asked for, its default run first, then the one nearest
    in size; else one of the model's, moved to the system; else, for a model without recipes, stated defaults.
    Where no batch is asked for, every GPU keeps the base's tokens per step. Raises BadInputError for a model,
    system or precision that does not exist, for changes that a search would override, and where no batch can
    be known.
    """
    precision = _precision(asked.precision)
    _refuse_unheard(asked)
    if "/" not in asked.model:
        loader.model(asked.model)  # names the nearest models where there is none of this name
    system = loader.system(asked.system)
    if system.gpu is None:
        raise BadInputError(f"--system {asked.system}: it has no GPU to project on; choose one that has")
    # what is read is a starting point: its layout, which is replaced, need not be legal with the changes
    unchecked = Loader(root=loader.root, rules=(), trees=loader.trees)
    if asked.model in reference_model_keys(loader.root):
        recipe, notes = _default_recipe(loader.model(asked.model), system, asked), [_DEFAULTS]
        recipe = _changed(recipe, asked.changes, unchecked)
    else:
        path = _nearest_recipe(asked, precision, unchecked)
        own = unchecked.recipe(path)
        recipe = unchecked.recipe(path, changes=asked.changes)
        notes = [f"all but the layout from {own.name}"]
        recipe, batch_note = _sized(recipe, asked, own)
        notes.append(batch_note)
    return Base(recipe=_moved(recipe, asked, system, precision), notes=tuple(notes))


def _refuse_unheard(asked: Asked) -> None:
    """Raises BadInputError for changes that a search would override."""
    options = {
        "model": ("MODEL", asked.model),
        "system": ("--system", asked.system),
        "parallel.num_gpus": ("--num-gpus", asked.num_gpus),
        "precision": ("--precision", asked.precision),
        "seq_len": ("--seq-len", asked.seq_len),
        "global_batch_size": ("--global-batch", asked.global_batch_size),
    }
    for key in sorted(asked.pinned):
        option, value = options.get(key, ("", None))
        if value is not None:
            raise BadInputError(f"--set {key}: {option} says {value}; remove one of the two")
        if key in FOLLOWS:
            raise BadInputError(f"--set {key}: it follows from {FOLLOWS[key]} in a search; remove it")


def _precision(text: str | None) -> Precision | None:
    known: tuple[Precision, ...] = get_args(Precision)
    for precision in known:
        if precision == text:
            return precision
    if text is None:
        return None
    raise BadInputError(f"--precision {text}: there is no such one; choose {', '.join(known)}")


def _nearest_recipe(asked: Asked, precision: Precision | None, loader: Loader) -> Path:
    """The base's file. Raises UnknownNameError for a model that does not exist."""
    default = find_recipe(asked.model, loader)
    if default.parent.name != asked.model:
        raise BadInputError(f"search: {asked.model} is a recipe; name its model, {default.parent.name}")

    def distance(path: Path) -> tuple[bool, bool, bool, float, bool, str]:
        recipe = loader.recipe(path)
        return (
            recipe.system.key != asked.system,
            precision is not None and recipe.precision != precision,
            path != default,
            abs(math.log2(recipe.parallel.num_gpus / asked.num_gpus)),
            bool(recipe.variant),
            path.stem,
        )

    return min((path for path in recipe_paths(loader.root) if path.parent == default.parent), key=distance)


def _sized(recipe: Recipe, asked: Asked, own: Recipe) -> tuple[Recipe, str]:
    """With the batch asked for, or the base's tokens per GPU and step."""
    if asked.global_batch_size is not None or "global_batch_size" in asked.pinned:
        number = asked.global_batch_size or recipe.global_batch_size
        return recipe.model_copy(update={"global_batch_size": number}), f"global batch {number:,} as asked"
    seq_len = asked.seq_len or recipe.seq_len
    tokens = own.tokens_per_step * asked.num_gpus
    number, left = divmod(tokens, own.parallel.num_gpus * seq_len)
    if left or not number:
        raise BadInputError(
            f"{own.name} has {own.tokens_per_step:,} tokens per step on {own.parallel.num_gpus} GPUs, which "
            f"gives {asked.num_gpus} GPUs no whole batch of {seq_len:,} tokens each; add --global-batch N"
        )
    return (
        recipe.model_copy(update={"global_batch_size": number}),
        f"global batch {number:,}, for as many tokens per GPU and step",
    )


def _changed(recipe: Recipe, changes: Sequence[str], loader: Loader) -> Recipe:
    """`recipe` with `key=value` changes, as a loader makes them to a file."""
    tree = parse_yaml(yaml.safe_dump(recipe.model_dump(mode="json")), shown_as="defaults")
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key:
            raise BadInputError(f"--set {change}: expected key=value, such as parallel.expert=8")
        leaf = parse_value(value, shown_as=f"--set {change}")
        tree = tree.with_value_at(tuple(key.split(".")), leaf)
    return loader.recipe_from_tree(tree)


def _moved(recipe: Recipe, asked: Asked, system: SystemSpec, precision: Precision | None) -> Recipe:
    """On the system, size, precision and length asked for, with layers that are not divided yet."""
    unsplit = {name: value for name, value in _UNSPLIT.items() if f"parallel.{name}" not in asked.pinned}
    changes: dict[str, object] = {
        "system": system,
        "seq_len": asked.seq_len or recipe.seq_len,
        "parallel": recipe.parallel.model_copy(update={"num_gpus": asked.num_gpus, **unsplit}),
        "reproduces": None,
        "differences": (),
        "origin": None,
        "variant": "",
    }
    if precision is not None and precision != recipe.precision:
        changes |= {"precision": precision, "low_precision": None}
    moved = recipe.model_copy(update=changes)
    # scales per row are torch's alone
    return with_kernels(moved, "torch_native") if moved.precision == "fp8_rowwise" else moved


def _default_recipe(model: ModelSpec, system: SystemSpec, asked: Asked) -> Recipe:
    """For a model without recipes: Transformer Engine with its fusions, sharded optimizer, overlapped."""
    if asked.global_batch_size is None:
        raise BadInputError(f"{asked.model} has no recipe whose batch could be kept; add --global-batch N")
    return Recipe(
        model=model,
        system=system,
        precision="bf16",
        seq_len=asked.seq_len or _DEFAULT_SEQ_LEN,
        global_batch_size=asked.global_batch_size,
        micro_batch_size=1,
        num_mtp_layers=model.num_mtp_layers,
        parallel=ParallelSpec(num_gpus=asked.num_gpus),
        kernels=KernelSpec(
            family="transformer_engine",
            fusions=Fusions(
                permute=True,
                router=True,
                rope=model.attention.kind == "gqa" or model.rope.scaling is not None,
                activation=True,
                gradient_accumulation=True,
                cross_entropy="te",
            ),
        ),
        dispatch=DispatchSpec(dispatcher="alltoall"),
        routing=Routing(mode="random_logits"),
        overlap=Overlap(grad_reduce=True, param_gather=True),
    )
