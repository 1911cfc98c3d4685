"""Models of the catalogue and recipes around them."""

from collections.abc import Callable

import pytest

from moe_bench.spec.catalogue import recipes_root
from moe_bench.spec.load import Loader
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.recipe import DispatchSpec, KernelSpec, OptimizerSpec, Recipe, Routing

RecipeMaker = Callable[..., Recipe]

BF16_STATES = OptimizerSpec(gradient_dtype="bf16", exp_avg_dtype="bf16", exp_avg_sq_dtype="bf16")


@pytest.fixture(scope="session")
def loader() -> Loader:
    return Loader(root=recipes_root())


@pytest.fixture(scope="session")
def models(loader: Loader) -> dict[str, ModelSpec]:
    return {path.parent.name: loader.model(path.parent.name) for path in loader.root.glob("*/model.yaml")}


@pytest.fixture(scope="session")
def make_recipe(loader: Loader) -> RecipeMaker:
    """A recipe on H100s around a model and a layout; keyword arguments replace the rest."""

    def make(model: ModelSpec, parallel: ParallelSpec, **fields: object) -> Recipe:
        defaults: dict[str, object] = {
            "system": loader.system("h100_sxm"),
            "precision": "bf16",
            "seq_len": 4096,
            "global_batch_size": 16 * parallel.data,
            "micro_batch_size": 1,
            "num_mtp_layers": 0,
            "kernels": KernelSpec(family="transformer_engine"),
            "dispatch": DispatchSpec(dispatcher="alltoall"),
            "routing": Routing(mode="round_robin"),
        }
        return Recipe(model=model, parallel=parallel, **(defaults | fields))

    return make


@pytest.fixture(scope="session")
def deepseek_256(models: dict[str, ModelSpec], make_recipe: RecipeMaker) -> Recipe:
    """DeepSeek-V3 on 256 GPUs: PP4 in 32 chunks, EP64, BF16 gradients and moments."""
    return make_recipe(
        models["deepseek_v3"],
        ParallelSpec(num_gpus=256, pipeline=4, virtual_pipeline=8, layout="Et|(tt|)*30L", expert=64),
        optimizer=BF16_STATES,
    )
