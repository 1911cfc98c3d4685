"""Every engine computes the same layer: outputs and all gradients against the float64 loop."""

from collections.abc import Iterator

import pytest
import torch

from moe_bench.errors import BadInputError
from moe_bench.harness.layer.bench import bench_here
from moe_bench.harness.layer.engine import Engine
from moe_bench.harness.layer.peers.agreement import ALLOWED_FRACTION, differences, observed, reference
from moe_bench.harness.layer.peers.deepspeed import DeepSpeed
from moe_bench.harness.layer.peers.huggingface import hugging_face_engines
from moe_bench.harness.layer.peers.megablocks import MegaBlocks
from moe_bench.harness.layer.peers.registry import all_engines
from moe_bench.harness.layer.peers.textbook import Textbook
from moe_bench.spec.catalogue import recipes_root
from moe_bench.spec.layer_case import LayerCase
from tests.harness.layer.peers.cases import BLOCKS, host, published_case, small_case, weights_and_inputs

WITHOUT_LOOP = {"gpt_oss_20b", "gpt_oss_120b"}
"""Megatron-Core's loop over experts has no backward pass with biases (spec/legality)."""

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron")


@pytest.fixture(scope="module")
def megatron_on_a_host() -> Iterator[None]:
    with bench_here(host(), is_tiny=True):
        yield


def worst_fractions(case: LayerCase, engines: dict[str, Engine], *, device: str = "cpu") -> dict[str, float]:
    """By engine, of those that can run the case, the difference of the tensor that is furthest off."""
    weights, x, gradient = weights_and_inputs(case, device=device)
    exact = reference(case, weights, x, gradient)
    worst = {}
    for name, engine in engines.items():
        if engine.obstacle(case) is None:
            with engine.build(case, weights, device=device) as layer:
                found = observed(layer, x, gradient)
            assert found.keys() == exact.keys(), name
            worst[name] = max(one.order() for one in differences(found, exact))
    return worst


def has_layer_alone(model: str) -> bool:
    try:
        published_case(model)
    except BadInputError:
        return False
    return True


def test_every_shipped_model_whose_layer_can_stand_alone_is_asked_for() -> None:
    models = {path.parent.name for path in recipes_root().glob("*/model.yaml")}
    assert BLOCKS.keys() == set(filter(has_layer_alone, models))


@pytest.mark.usefixtures("megatron_on_a_host")
@pytest.mark.parametrize("model", BLOCKS)
def test_all_engines_compute_the_layer_of_a_shipped_model(model: str) -> None:
    worst = worst_fractions(small_case(model), all_engines(host()))
    blocks = {
        name.removeprefix("hf_").rsplit("_", maxsplit=1)[0] for name in worst if name.endswith("_eager")
    }
    ways = ("eager", "grouped_mm", "batched_mm")
    assert blocks == BLOCKS[model]
    assert worst.keys() >= {f"hf_{block}_{way}" for block in blocks for way in ways}
    assert worst.keys() >= {"textbook", "torch_native"}
    assert ("sequential" in worst) == (model not in WITHOUT_LOOP)
    assert {name: fraction for name, fraction in worst.items() if fraction > 1e-5} == {}


@pytest.mark.usefixtures("megatron_on_a_host")
@pytest.mark.parametrize("model", ["deepseek_v3", "gpt_oss_20b", "qwen3_30b_a3b"])
def test_in_bf16_they_agree_as_far_as_bf16_can_tell(model: str) -> None:
    case = small_case(model, precision="bf16", init_std=0.1)
    worst = worst_fractions(
        case, {"torch_native": all_engines(host())["torch_native"], "textbook": Textbook()}
    )
    assert max(worst.values()) <= ALLOWED_FRACTION["bf16"]
    assert min(worst.values()) > ALLOWED_FRACTION["fp32"]


def test_a_tensor_that_is_missing_or_not_finite_differs_without_bound() -> None:
    exact = {"output": torch.ones(2, dtype=torch.float64), "fc1": torch.ones(2, dtype=torch.float64)}
    (missing, infinite) = differences({"output": torch.tensor([1.0, torch.nan])}, exact)
    assert (missing.tensor, missing.difference_fraction) == ("fc1", None)
    assert (infinite.tensor, infinite.difference_fraction) == ("output", None)


def test_a_difference_is_the_larger_of_norm_and_largest_value() -> None:
    # one of 100 values is off by 0.1: a hundredth of the norm, a tenth of the largest
    found = torch.ones(100)
    found[7] = 1.1
    (one,) = differences({"fc2": found}, {"fc2": torch.ones(100, dtype=torch.float64)})
    assert one.difference_fraction == pytest.approx(0.1)


@pytest.mark.gpu("grouped_mm has another kernel on a CPU")
@pytest.mark.parametrize("model", BLOCKS)
def test_other_peoples_layers_agree_in_bf16_on_a_gpu(model: str) -> None:
    engines = {
        engine.name: engine for engine in (*hugging_face_engines(), DeepSpeed(), MegaBlocks(), Textbook())
    }
    case = small_case(model, precision="bf16", init_std=0.1)
    worst = worst_fractions(case, engines, device="cuda")
    allowed = ALLOWED_FRACTION["bf16"]
    assert {name: fraction for name, fraction in worst.items() if fraction > allowed} == {}
