"""Tokens and bytes that every closed form starts from."""

from moe_bench.analysis.activations import activation_element_bytes, token_counts
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.parallel import ParallelSpec
from tests.analysis.conftest import RecipeMaker


def test_context_and_tensor_parallelism_divide_the_tokens(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    parallel = ParallelSpec(num_gpus=8, context=2, tensor=2, sequence_parallel=True)
    counts = token_counts(make_recipe(models["mixtral_8x7b"], parallel, micro_batch_size=2))
    assert counts.gathered == 4096
    assert counts.sharded == 2048


def test_only_fp32_activations_have_four_bytes(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    recipes = [
        make_recipe(models["mixtral_8x7b"], ParallelSpec(num_gpus=8), precision=precision)
        for precision in ("fp32", "bf16", "fp8_blockwise")
    ]
    assert [activation_element_bytes(recipe) for recipe in recipes] == [4, 2, 2]
