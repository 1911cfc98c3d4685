"""The listed tensors of a rank are its parameters, for shapes that no recipe has as well."""

import pytest

from moe_bench.analysis.params import rank_params
from moe_bench.analysis.tensors import Tensor, chunk_parts, chunk_tensors
from moe_bench.spec.catalogue import recipes_root, reference_model_keys
from moe_bench.spec.load import Loader
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.pipeline import Chunk, pipeline_chunks
from moe_bench.spec.recipe import Recipe
from tests.analysis.conftest import RecipeMaker

LOADER = Loader(root=recipes_root())
REFERENCES = reference_model_keys(LOADER.root)


def stage_chunks(recipe: Recipe, stage: int) -> list[Chunk]:
    chunks = pipeline_chunks(
        recipe.parallel, num_layers=recipe.model.num_layers, num_mtp_layers=recipe.num_mtp_layers
    )
    return [chunk for chunk in chunks if chunk.pipeline_rank == stage]


def layer_of(recipe: Recipe, layer: int) -> dict[str, Tensor]:
    """Tensors of one decoder layer by name, of the whole model on one rank."""
    (chunk,) = stage_chunks(recipe, 0)
    parts = [part for part in chunk_parts(recipe, chunk) if part.is_layer]
    return {tensor.name: tensor for tensor in parts[layer].tensors}


@pytest.mark.parametrize(("tensor", "expert"), [(1, 1), (2, 8)])
@pytest.mark.parametrize("key", REFERENCES)
def test_the_tensors_of_both_stages_are_the_parameters_of_their_ranks(
    key: str, tensor: int, expert: int, make_recipe: RecipeMaker
) -> None:
    # GPT-3's odd vocabulary would be padded, which nothing counts
    model = LOADER.model(key).model_copy(update={"vocab_size": 128_000})
    expert = 1 if model.moe is None else expert
    parallel = ParallelSpec(
        num_gpus=32, tensor=tensor, pipeline=2, num_layers_last_stage=5, expert=expert, expert_tensor=1
    )
    recipe = make_recipe(model, parallel, num_mtp_layers=2 * (model.num_mtp_layers > 0))
    for stage in (0, 1):
        listed = [tensor for chunk in stage_chunks(recipe, stage) for tensor in chunk_tensors(recipe, chunk)]
        counted = rank_params(recipe, stage)
        experts = sum(tensor.num_elements for tensor in listed if tensor.is_expert)
        everything = sum(tensor.num_elements for tensor in listed)
        assert (everything - experts, experts) == (counted.dense, counted.expert)


def test_half_layers_have_one_norm_and_no_gate(make_recipe: RecipeMaker) -> None:
    nano = LOADER.model("nemotron_3_nano_30b_a3b")
    recipe = make_recipe(nano, ParallelSpec(num_gpus=1))
    mamba, experts = layer_of(recipe, 0), layer_of(recipe, 1)
    assert "pre_mlp_layernorm.weight" not in mamba
    # hidden 2688, 64 heads of 64, 8 groups of 128 states
    assert mamba["in_proj.weight"].num_elements == 2688 * (2 * 4096 + 2 * 8 * 128 + 64)
    assert "input_layernorm.weight" not in experts
    assert experts["shared_experts.linear_fc1.weight"].num_elements == 2688 * 3712


def test_experts_of_a_smaller_width_stand_between_two_repeated_projections(make_recipe: RecipeMaker) -> None:
    model = LOADER.model("nemotron_3_super_120b_a12b")
    tensors = layer_of(make_recipe(model, ParallelSpec(num_gpus=1)), 1)
    assert tensors["fc1_latent_proj.weight"].num_elements == 4096 * 1024
    assert tensors["linear_fc1.weight"].num_columns == 1024


def test_a_gate_on_attention_is_projected_with_the_queries(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    model = models["qwen3_30b_a3b"]
    gated = model.model_copy(update={"attention": model.attention.model_copy(update={"output_gate": True})})
    plain, with_gate = (
        layer_of(make_recipe(each, ParallelSpec(num_gpus=1)), 0)["linear_qkv.weight"].num_elements
        for each in (model, gated)
    )
    assert with_gate - plain == 32 * 128 * 2048
