"""Every knob of the registry has a recipe field, and a comparison finds what differs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from moe_bench.results.published import PublishedOptimizer, PublishedRow, load_rows, model_key
from moe_bench.results.row_recipe import KNOBS, Knob, row_value
from moe_bench.spec.recipe import Recipe

REPOSITORY = Path(__file__).resolve().parents[2]
ROWS = load_rows(REPOSITORY / "results" / "published")

NOT_A_KNOB = {
    "id": "name",
    "kind": "what was measured",
    "metrics": "result",
    "estimate": "result",
    "flops_convention": "how the result was counted",
    "version": "of the source's software; a recipe states its own container",
    "source": "where it is printed",
    "trust": "our grade",
    "series": "grouping",
    "note": "text",
    "method": "name of a whole configuration whose parts have their own columns",
    "ga": "follows from batches and layout",
    "local_batch": "follows from batches and layout",
    "dp": "follows from GPUs and layout",
    "other": "text; read below, phrase by phrase",
    "optimizer": "read by its parts",
    "optimizer.precision_aware": "follows from the types of the states",
}

NO_SUCH_LAYER = "belongs to a kind of layer that ModelSpec does not describe"
OTHER_ENGINE = "a pipeline schedule that Megatron-Core does not have"
OTHER_LIBRARY = "a grouped GEMM library of Automodel that no kernel family of ours stands for"
OTHER_FSDP = "torch's FSDP2; Megatron-FSDP or the distributed optimizer stands in, as a stated difference"
INEXPRESSIBLE = {
    ("recompute", "mhc"): NO_SUCH_LAYER,
    ("recompute", "gdn_norm_out"): NO_SUCH_LAYER,
    ("cuda_graph_modules", "mamba"): NO_SUCH_LAYER,
    ("pipeline_schedule", "dualpipe"): OTHER_ENGINE,
    ("pipeline_schedule", "zero-bubble"): OTHER_ENGINE,
    ("pipeline_schedule", "zbv"): OTHER_ENGINE,
    ("pipeline_schedule", "v-half"): OTHER_ENGINE,
    ("pipeline_schedule", "v-min"): OTHER_ENGINE,
    ("experts_backend", "gmm"): OTHER_LIBRARY,
    ("experts_backend", "te_mxfp8"): "kernels.family transformer_engine with precision mxfp8",
    ("experts_backend", "torchao_mxfp8"): OTHER_LIBRARY,
    ("sharding", "fsdp2"): OTHER_FSDP,
}
"""Printed values that no value of a recipe field equals, and why."""

SPOKEN_OF_IN_OTHER = {
    # phrase of the column `other` -> recipe field that answers to it, or why none has to
    "TE attention/linear/RMSNorm + DeepEP": "kernels.family",
    "TE + DeepEP": "kernels.family",
    "TE + DeepEP + FlexAttention": "kernels.attention",
    "TE + DeepEP + torch_mm experts": "kernels.family",
    "TE + fsdp2_prefetch": "parallel.data_sharding",
    "TE + triton LoRA kernels": "kernels.family",
    "TE attention": "kernels.attention",
    "TE attention (baseline)": "kernels.attention",
    "TorchSDPA + TE + DeepEP": "kernels.attention",
    "SDPA + torch.compile": "kernels.family",
    "2 layers per stage": "parallel.layout",
    "pp microbatch 1, 8 microbatches/step": "micro_batch_size",
    "reshard_after_forward=False": "parallel.fsdp_strategy",
    "reshard_after_forward=True": "parallel.fsdp_strategy",
    "torch.compile": "kernels.family",
    "torch.compile + Float8": "precision",
    "compile + Float8": "precision",
    "compile + Float8 + AsyncTP": "overlap.tensor_parallel",
    "eager": "kernels.family",
    "64-token combine chunks": "env",
    "logs the parameter norm in every step": "mcore",
    "BF16 baseline": "precision",
    "MegaBlocks dropless": "kernels.family",
    "4-way tensor-expert (EDP)": "parallel.expert_tensor",
    "BSHD": "mcore",
    "dispatch by its own all-to-all, later released as DeepEP": "dispatch.dispatcher",
    "GBS ramped 3072 -> 15360": "global_batch_size",
    "EP across 8 nodes": "parallel.expert",
}


def columns() -> list[str]:
    return [*PublishedRow.model_fields, *(f"optimizer.{name}" for name in PublishedOptimizer.model_fields)]


def inner_models(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from inner_models(part)


def is_recipe_field(path: str) -> bool:
    owners: list[type[BaseModel]] = [Recipe]
    for name in path.split("."):
        holders = [owner for owner in owners if name in owner.model_fields]
        if not holders:
            return False
        owners = [inner for owner in holders for inner in inner_models(owner.model_fields[name].annotation)]
    return True


def words_of(knob: Knob, row: PublishedRow) -> tuple[str, ...]:
    printed = row_value(row, knob.column)
    if printed is None:
        return ()
    value = knob.of_row(printed)
    return tuple(sorted(value)) if isinstance(value, frozenset) else (str(value),)


@pytest.mark.parametrize("column", columns())
def test_every_column_is_a_knob_or_says_why_not(column: str) -> None:
    assert (column in {knob.column for knob in KNOBS}) != (column in NOT_A_KNOB)


@pytest.mark.parametrize("knob", KNOBS, ids=lambda knob: knob.column)
def test_every_knob_names_fields_that_a_recipe_has(knob: Knob) -> None:
    assert knob.fields or knob.column == "framework"
    assert [path for path in knob.fields if not is_recipe_field(path)] == []


def test_a_field_that_a_recipe_lacks_would_be_noticed() -> None:
    assert is_recipe_field("token_drop.capacity_factor")
    assert not is_recipe_field("token_drop.capacity")


@pytest.mark.parametrize("knob", [knob for knob in KNOBS if knob.vocabulary], ids=lambda knob: knob.column)
def test_every_printed_value_can_be_said_in_a_recipe(knob: Knob) -> None:
    assert knob.vocabulary is not None
    printed = {word for row in ROWS for word in words_of(knob, row)}
    unsaid = {word for word in printed - knob.vocabulary if (knob.column, word) not in INEXPRESSIBLE}
    assert unsaid == set()


@pytest.mark.parametrize(("column", "word"), INEXPRESSIBLE, ids=lambda part: str(part))
def test_every_exception_is_needed(column: str, word: str) -> None:
    knob = next(knob for knob in KNOBS if knob.column == column)
    assert knob.vocabulary is not None
    assert word not in knob.vocabulary
    assert any(word in words_of(knob, row) for row in ROWS)


def test_layers_that_cannot_be_described_belong_to_models_without_recipes() -> None:
    with_recipes = {path.parent.name for path in (REPOSITORY / "recipes").glob("*/model.yaml")}
    excused = {key for key, reason in INEXPRESSIBLE.items() if reason == NO_SUCH_LAYER}
    models = {
        model_key(row.model)
        for row in ROWS
        for knob in KNOBS
        for word in words_of(knob, row)
        if (knob.column, word) in excused
    }
    assert models & with_recipes == set()


def test_everything_said_in_other_has_a_recipe_field() -> None:
    phrases = {phrase for row in ROWS if row.other for phrase in row.other.split("; ")}
    assert phrases == set(SPOKEN_OF_IN_OTHER)
    assert [path for path in SPOKEN_OF_IN_OTHER.values() if not is_recipe_field(path)] == []
