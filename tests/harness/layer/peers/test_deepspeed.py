"""DeepSpeed's own layer on the host, where it is installed, and what it is not asked for."""

from importlib.util import find_spec

import pytest

from moe_bench.harness.layer.peers.agreement import differences, observed, reference
from moe_bench.harness.layer.peers.deepspeed import DeepSpeed
from moe_bench.spec.layer_case import LayerCase
from tests.harness.layer.peers.cases import small_case, weights_and_inputs

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason='deepspeed is not installed: pip install "deepspeed>=0.19"'
)


def softmax_case(top_k: int) -> LayerCase:
    """Mixtral's layer for another number of experts per token; DeepSpeed renormalises from two on."""
    case = small_case("mixtral_8x7b")
    router = case.moe.router.model_copy(update={"renormalise": top_k > 1})
    return case.model_copy(update={"moe": case.moe.model_copy(update={"top_k": top_k, "router": router})})


@needs_deepspeed
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_its_layer_agrees_with_the_loop(top_k: int) -> None:
    case = softmax_case(top_k)
    weights, x, gradient = weights_and_inputs(case)
    with DeepSpeed().build(case, weights, device="cpu") as layer:
        found = observed(layer, x, gradient)
    exact = reference(case, weights, x, gradient)
    assert found.keys() == exact.keys()
    assert max(one.order() for one in differences(found, exact)) < 1e-5


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("deepseek_v3", "its router has softmax, not sigmoid"),
        ("deepseek_v2_lite", "it has no shared expert"),
        ("gpt_oss_20b", "its router has no bias"),
        ("olmoe_1b_7b", "its router renormalises from top-2 on"),
    ],
)
def test_it_says_which_layers_it_cannot_compute(model: str, reason: str) -> None:
    assert DeepSpeed().obstacle(small_case(model)) == reason
