"""Where a search starts: the nearest recipe of the model, moved to the job that is asked for."""

import pytest

from moe_bench.errors import BadInputError
from moe_bench.projection.search.base import Asked, Base, search_base
from tests.projection.search_spaces import LOADER


def base(model: str, num_gpus: int, *changes: str, system: str = "h100_sxm", **others: object) -> Base:
    return search_base(
        Asked(model=model, system=system, num_gpus=num_gpus, changes=changes, **others),  # type: ignore[arg-type]
        LOADER,
    )


def test_the_default_run_comes_before_a_recipe_of_the_same_size() -> None:
    assert "all but the layout from deepseek_v3/h100_sxm_256g_bf16" in base("deepseek_v3", 1024).notes


def test_the_precision_asked_for_comes_before_the_default_run() -> None:
    made = base("deepseek_v3", 1024, precision="fp8_blockwise")
    assert "all but the layout from deepseek_v3/h100_sxm_1024g_fp8_blockwise" in made.notes
    assert made.recipe.low_precision is not None


def test_a_gpu_keeps_its_tokens_per_step() -> None:
    own = LOADER.recipe(LOADER.root / "deepseek_v3/h100_sxm_256g_bf16.yaml")
    made = base("deepseek_v3", 512, seq_len=8192).recipe
    assert made.tokens_per_step == own.tokens_per_step * 2
    assert made.seq_len == 8192


def test_a_batch_that_does_not_come_out_whole_is_asked_for() -> None:
    with pytest.raises(BadInputError, match="add --global-batch N"):
        base("deepseek_v3", 7, seq_len=4095)


def test_a_system_without_recipes_gets_the_models_own() -> None:
    made = base("olmoe_1b_7b", 8, system="b200").recipe
    assert made.system.key == "b200"
    assert made.reproduces is None


def test_scales_per_row_come_with_the_kernels_that_have_them() -> None:
    made = base("deepseek_v3", 256, precision="fp8_rowwise").recipe
    assert (made.precision, made.kernels.family) == ("fp8_rowwise", "torch_native")


def test_options_of_another_precision_are_left_behind() -> None:
    made = base("deepseek_v3", 256, precision="bf16", system="gb300_nvl72").recipe
    assert (made.precision, made.low_precision) == ("bf16", None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("parallel.num_gpus=64", "--num-gpus says 256; remove one of the two"),
        ("precision=bf16", "--precision says fp8_blockwise; remove one of the two"),
        ("parallel.sequence_parallel=false", "it follows from parallel.tensor in a search; remove it"),
        ("overlap.p2p=false", "it follows from parallel.virtual_pipeline in a search; remove it"),
    ],
)
def test_a_change_that_a_search_would_override_is_refused(change: str, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        base("deepseek_v3", 256, change, precision="fp8_blockwise")


def test_a_change_reaches_the_base() -> None:
    assert base("deepseek_v3", 256, "optimizer.gradient_dtype=fp32").recipe.optimizer.gradient_dtype == "fp32"


def test_the_division_of_layers_is_not_taken_over_unless_it_is_set() -> None:
    assert base("qwen3_235b_a22b", 256).recipe.parallel.embedding_counts_as_layer is False
    kept = base("qwen3_235b_a22b", 256, "parallel.micro_batch_group_size=16").recipe
    assert kept.parallel.micro_batch_group_size == 16


def test_a_model_without_recipes_starts_from_stated_defaults() -> None:
    made = base("llama3_8b", 8, global_batch_size=64, precision="fp8_tensorwise")
    assert made.notes[0].startswith("no recipe of this model")
    assert made.recipe.precision == "fp8_tensorwise"
    with pytest.raises(BadInputError, match="add --global-batch N"):
        base("llama3_8b", 8)
    changed = base("llama3_8b", 8, "parallel.tensor=4", "optimizer.weight_decay=0.2", global_batch_size=64)
    assert (changed.recipe.parallel.tensor, changed.recipe.optimizer.weight_decay) == (4, 0.2)


@pytest.mark.parametrize(
    ("model", "system", "precision", "message"),
    [
        ("deepseek_v9", "h100_sxm", None, "there is no model 'deepseek_v9'; did you mean"),
        ("deepseek_v3", "h100", None, "there is no system 'h100'; did you mean"),
        ("deepseek_v3", "cpu_host", None, "it has no GPU"),
        ("deepseek_v3", "h100_sxm", "fp9", "choose fp32, bf16"),
        ("deepseek_v3/h100_sxm_256g_bf16", "h100_sxm", None, "name its model, deepseek_v3"),
    ],
)
def test_what_does_not_exist_is_refused(model: str, system: str, precision: str | None, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        base(model, 8, system=system, precision=precision)
