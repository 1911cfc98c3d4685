"""Every knob of a recipe arrives at Megatron-Core, at the environment or at the launch line."""

import dataclasses
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from moe_bench.errors import BadInputError
from moe_bench.harness import mcore_fields
from moe_bench.harness.mcore_config import as_json, megatron_arguments, override_problems
from moe_bench.launch.local import env_prefix
from moe_bench.spec.catalogue import recipes_root
from moe_bench.spec.load import Loader
from moe_bench.spec.mixer import ChunkedAttention, GatedDeltaNet
from moe_bench.spec.model import ExpertStep
from moe_bench.spec.recipe import LowPrecision, QuantizationSpec, Recipe, TokenDrop

LOADER = Loader(root=recipes_root())


def recipe_named(name: str) -> Recipe:
    return LOADER.recipe(LOADER.root / f"{name}.yaml")


MLA = recipe_named("deepseek_v3/h100_sxm_256g_bf16").model_copy(update={"num_mtp_layers": 1})
GQA = recipe_named("gpt_oss_20b/h100_sxm_8g_bf16")
FP8 = recipe_named("deepseek_v3/h100_sxm_1024g_fp8_blockwise").model_copy(
    update={
        "low_precision": LowPrecision(),
        "quantization": QuantizationSpec(format="nvfp4"),
        "token_drop": TokenDrop(capacity_factor=1.0),
    }
)

NOT_BUILT = {
    "model.hybrid_pattern": "M*E-" * 15 + "M",
    "model.mamba": None,
    "model.gated_delta_net": GatedDeltaNet(
        num_key_heads=1, key_head_dim=8, num_value_heads=1, value_head_dim=8, full_attention_every=4
    ),
    "model.compressed_attention": None,
    "model.num_residual_streams": 4,
    "model.attention.output_gate": True,
    "model.attention.chunked": ChunkedAttention(chunk_tokens=8192, full_attention_every=4),
    "model.moe.latent_size": 1024,
    "model.attention.sparse": None,
    "model.mtp_is_shared": True,
    "model.mtp_pattern": None,
}
"""Structures for accounting and projection only, with a value that must be refused; None where it takes
another model or another of them beside it.
"""

NOT_ARGUMENTS = {
    **dict.fromkeys(NOT_BUILT, "refused, see test_a_structure_that_is_only_counted_is_refused"),
    "variant": "part of the file name",
    "reproduces": "names a published row",
    "differences": "explains departures from that row",
    "origin": "names the recipe that this one was computed from",
    "container": "the launch line names the image (tests/launch/test_slurm.py)",
    "model.key": "file name",
    "model.display_name": "for tables",
    "model.hf_id": "for people",
    "model.hf_model_type": "chooses the map to Hugging Face's checkpoints",
    "model.default_run": "resolves the bare model name",
    "model.num_mtp_layers": "what the model has; the recipe's num_mtp_layers is what runs",
    "model.published": "published counts",
    "model.sources": "citations",
    "model.attention.kind": "decides the class",
    "model.max_position_embeddings": "only a bound: the sequence length is what is built",
    "system": "which machine; the launch line and the checks read it",
    "parallel.virtual_pipeline": "read off the layout string where there is one (its own case below)",
    "parallel.embedding_counts_as_layer": "excluded by a layout string (its own case below)",
    "parallel.fsdp_strategy": "read with megatron_fsdp only (its own case below)",
    "recompute.method": "read with full recompute only (its own case below)",
    "recompute.num_layers": "read with full recompute only (its own case below)",
    "recompute.modules": "read with selective recompute only (its own case below)",
    "routing.bias_std": "read with mode biased only (its own case below)",
    "mcore": "its own case below",
}

OTHER_VALUES: dict[str, Any] = {
    "precision": "fp8_tensorwise",
    "parallel.layout": "Ett|t|(tt|)*29L",
    "kernels.family": "torch_native",
    "kernels.attention": "flash",
    "dispatch.dispatcher": "allgather",
    "routing.mode": "natural",
    "routing.trace": ((1, 2, 3),),
    "recompute.granularity": "none",
    "env": {"NCCL_DEBUG": "INFO"},
    "patches": ("mtp_token_count_under_cp",),
    "low_precision": LowPrecision(param_gather=True),
    "quantization": QuantizationSpec(format="fp8"),
    "token_drop": TokenDrop(capacity_factor=2.0),
    "model.moe.steps": (ExpertStep(from_layer=1, num_experts=8, expert_ffn_hidden_size=64),),
}

REFUSED_BESIDE = {
    ("mla", "model.rope.interleaved"): "Megatron-Core's MLA always interleaves",
    ("mla", "model.rope.scaling.round_correction_range"): "Megatron-Core's MLA always rounds",
    ("mla", "model.moe.router.renormalise"): "both MLA bases score by sigmoid, which always renormalises",
}
"""Fields of which one value is illegal (spec/legality.py), so that there are no two to tell apart."""


def leaves(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted name, annotation and value of every field that holds no further fields."""
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        path = f"{prefix}{name}"
        if isinstance(value, BaseModel) and path not in NOT_ARGUMENTS:
            yield from leaves(value, f"{path}.")
        elif path not in NOT_ARGUMENTS:
            yield path, field.annotation, value


def another(path: str, annotation: Any, value: Any) -> Any:
    """A value of the same field that differs from `value`."""
    if path in OTHER_VALUES:
        return OTHER_VALUES[path]
    choices = _choices(annotation)
    if choices:
        if isinstance(value, tuple):
            return tuple(choice for choice in choices if choice not in value)[:1]
        return next(choice for choice in choices if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return (
            type(value)(value + 1) if value >= 1 else value + 0.5 if isinstance(value, float) else value + 1
        )
    if value is None:
        return 3
    raise AssertionError(f"{path}: give another value for {value!r} in OTHER_VALUES")


def _choices(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) is typing.Literal:
        return typing.get_args(annotation)
    return tuple(choice for inner in typing.get_args(annotation) for choice in _choices(inner))


def changed(recipe: Recipe, path: str, value: Any) -> Recipe:
    def set_in(model: BaseModel, keys: list[str]) -> BaseModel:
        key, *rest = keys
        new = set_in(getattr(model, key), rest) if rest else value
        return model.model_copy(update={key: new})

    return typing.cast(Recipe, set_in(recipe, path.split(".")))


def everything(recipe: Recipe) -> tuple[str, tuple[str, ...]]:
    """Megatron-Core's arguments and the environment of the launch line."""
    return json.dumps(as_json(megatron_arguments(recipe))), env_prefix(recipe.env)


CASES = [
    pytest.param(base, path, another(path, annotation, value), id=f"{base.model.key}-{path}")
    for base in (MLA, GQA, FP8)
    for path, annotation, value in leaves(base)
    if (base.model.attention.kind, path) not in REFUSED_BESIDE
]


@pytest.mark.parametrize(("base", "path", "value"), CASES)
def test_a_knob_arrives(base: Recipe, path: str, value: Any) -> None:
    assert everything(changed(base, path, value)) != everything(base)


@pytest.mark.parametrize(("path", "value"), [one for one in NOT_BUILT.items() if one[1] is not None])
def test_a_structure_that_is_only_counted_is_refused(path: str, value: Any) -> None:
    with pytest.raises(BadInputError, match=r"gpt_oss_20b: .* is for accounting and projection only"):
        megatron_arguments(changed(GQA, path, value))


def test_the_walk_meets_every_field_of_the_schema() -> None:
    met = {path for base in (MLA, GQA, FP8) for path, _, _ in leaves(base)}
    assert len(met) > 120
    for name in Recipe.model_fields:
        assert name in NOT_ARGUMENTS or any(path.partition(".")[0] == name for path in met), name


def alone(base: Recipe, **updates: Any) -> Recipe:
    return base.model_copy(update=updates)


@pytest.mark.parametrize(
    ("base", "path", "first", "second"),
    [
        (changed(GQA, "parallel.layout", None), "parallel.virtual_pipeline", 2, 3),
        (changed(GQA, "parallel.layout", None), "parallel.embedding_counts_as_layer", False, True),
        (
            changed(GQA, "parallel.data_sharding", "megatron_fsdp"),
            "parallel.fsdp_strategy",
            "optim",
            "optim_grads",
        ),
        (changed(MLA, "recompute.granularity", "full"), "recompute.method", "uniform", "block"),
        (changed(MLA, "recompute.granularity", "full"), "recompute.num_layers", 1, 2),
        (changed(MLA, "recompute.granularity", "selective"), "recompute.modules", ("mlp",), ("moe_act",)),
        (changed(MLA, "routing.mode", "biased"), "routing.bias_std", 0.5, 1.0),
        (GQA, "mcore", {}, {"moe_input_jitter_eps": 0.01}),
    ],
)
def test_a_knob_that_is_read_only_beside_another_arrives_there(
    base: Recipe, path: str, first: Any, second: Any
) -> None:
    assert everything(changed(base, path, first)) != everything(changed(base, path, second))


def test_fp8_with_a_scale_per_row_is_the_experts_and_bf16_to_megatron_core() -> None:
    plain, rowwise = (
        megatron_arguments(alone(GQA, precision=precision)) for precision in ("bf16", "fp8_rowwise")
    )
    assert rowwise.training == plain.training | {"experts_are_fp8": True}
    assert rowwise.transformer == plain.transformer
    assert rowwise.optimizer == plain.optimizer


def test_an_override_reaches_every_class_that_has_the_field() -> None:
    arguments = megatron_arguments(GQA.model_copy(update={"mcore": {"barrier_with_L1_time": False}}))
    assert arguments.transformer["barrier_with_L1_time"] is False
    assert arguments.optimizer["barrier_with_L1_time"] is False


def test_an_override_of_what_the_schema_covers_is_refused() -> None:
    problems = override_problems(
        GQA.model_copy(update={"mcore": {"moe_router_topk": 2, "nothing_like_it": 1}})
    )
    assert [problem.path for problem in problems] == [
        ("mcore", "moe_router_topk"),
        ("mcore", "nothing_like_it"),
    ]


def test_the_list_of_fields_is_the_installed_megatron_cores() -> None:
    """An outside truth: the classes themselves."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    by_class = {
        "TransformerConfig": MLATransformerConfig,
        "DistributedDataParallelConfig": DistributedDataParallelConfig,
        "OptimizerConfig": OptimizerConfig,
    }
    stored = json.loads(Path(mcore_fields.__file__).with_suffix(".json").read_text())
    for name, kind in by_class.items():
        installed = {field.name for field in dataclasses.fields(kind) if not field.name.startswith("_")}
        assert set(stored[name]) == installed


def test_every_argument_is_a_field_that_megatron_core_has() -> None:
    stored = json.loads(Path(mcore_fields.__file__).with_suffix(".json").read_text())
    for recipe in (MLA, GQA, FP8):
        arguments = megatron_arguments(recipe)
        assert set(arguments.transformer) <= set(stored["TransformerConfig"])
        assert set(arguments.ddp) <= set(stored["DistributedDataParallelConfig"])
        assert set(arguments.optimizer) <= set(stored["OptimizerConfig"])


def test_the_embedding_group_is_first_rank_mtp_rank_and_the_last_only_if_tied() -> None:
    mtp_alone = recipe_named("deepseek_v3/h100_sxm_1024g_fp8_blockwise_mtp_alone")
    # 32 stages over 8 ranks: `m` is stage 30, rank 6; the untied loss is on rank 7
    assert megatron_arguments(mtp_alone).parallel_state["embedding_pipeline_ranks"] == (0, 6)
    untied = recipe_named("deepseek_v3/h100_sxm_256g_bf16")
    assert megatron_arguments(untied).parallel_state["embedding_pipeline_ranks"] == (0,)
    tied = changed(untied, "model.tied_embeddings", True)
    assert megatron_arguments(tied).parallel_state["embedding_pipeline_ranks"] == (0, 3)
