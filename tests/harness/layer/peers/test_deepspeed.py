"""DeepSpeed's own layer on the host, where it is installed, and what it is not asked for."""

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from moe_bench.harness.layer.peers.agreement import differences, observed, reference
from moe_bench.harness.layer.peers.deepspeed import DeepSpeed
from moe_bench.harness.routers import GShardRouter
from moe_bench.spec.layer_case import LayerCase
from moe_bench.spec.recipe import TokenDrop
from tests.harness.kernels.configs import small_config
from tests.harness.kernels.fused.layers import moe_layer
from tests.harness.kernels.ranks import Groups, groups_of_one
from tests.harness.kernels.test_shared_experts import residual_layer
from tests.harness.layer.peers.cases import small_case, weights_and_inputs

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason='deepspeed is not installed: pip install "deepspeed>=0.19"'
)


@pytest.fixture
def groups() -> Iterator[Groups]:
    with groups_of_one() as groups:
        yield groups


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


@needs_deepspeed
@pytest.mark.filterwarnings("ignore")
def test_its_residual_layer_and_ours_agree_without_second_biases(groups: Groups) -> None:
    """It ignores the bias that Megatron's MLP returns beside its output; that of a plain MLP it adds."""
    ours = residual_layer()
    for half in (ours.experts, ours.shared_experts):
        half.linear_fc2.bias.data.zero_()
    named = dict(ours.named_parameters())
    theirs = import_module("deepspeed.moe.layer").MoE(
        hidden_size=64, expert=torch.nn.Identity(), num_experts=8, drop_tokens=False, use_rts=False,
        use_residual=True,
    )  # fmt: skip
    experts = theirs.deepspeed_moe.experts
    experts.deepspeed_experts = torch.nn.ModuleList(
        mlp([named[f"experts.linear_fc{n}.{kind}"][expert] for n in (1, 2) for kind in ("weight", "bias")])
        for expert in range(8)
    )
    theirs.mlp = mlp(
        [named[f"shared_experts.linear_fc{n}.{kind}"] for n in (1, 2) for kind in ("weight", "bias")]
    )
    theirs.deepspeed_moe.gate.wg.weight.data = named["router.weight"].detach().clone()
    theirs.coefficient.weight.data = named["mixing.weight"].detach().clone()
    theirs.coefficient.bias.data = named["mixing.bias"].detach().clone()
    x, grad = torch.randn(2, 12, 2, 64, generator=torch.Generator().manual_seed(5))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = (ours(inputs[0])[0], theirs(inputs[1])[0])
    for output in outputs:
        output.backward(grad)
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    close(*outputs)
    close(inputs[0].grad, inputs[1].grad)
    close(ours.router.weight.grad, theirs.deepspeed_moe.gate.wg.weight.grad)
    close(ours.mixing.weight.grad, theirs.coefficient.weight.grad)
    close(ours.shared_experts.linear_fc1.bias.grad, theirs.mlp[0].bias.grad)
    their_first = torch.stack([one[0].weight.grad for one in experts.deepspeed_experts])
    close(ours.experts.linear_fc1.weight.grad, their_first)


@needs_deepspeed
def test_its_top2_gate_and_gshards_fill_capacities_with_the_same_tokens(groups: Groups) -> None:
    from megatron.core.transformer.moe.moe_layer import MoELayer

    drop = TokenDrop(capacity_factor=0.5, policy="position")
    config = small_config(moe_router_topk=2, moe_expert_capacity_factor=0.5)
    layer = moe_layer(MoELayer, config, router=partial(GShardRouter, drop=drop, seed=1)).eval()
    x = torch.randn(24, 2, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits = layer.router.gating(x).view(-1, 8)
        _, chosen = layer.router(x)
    gate = import_module("deepspeed.moe.sharded_moe").top2gating
    _, _, dispatched, _ = gate(logits.clone(), 0.5, 0, top2_2nd_expert_sampling=False)
    assert torch.equal(dispatched.any(dim=2), chosen)
    assert set(chosen.sum(1).tolist()) == {0, 1, 2}


def mlp(parameters: list[torch.Tensor]) -> torch.nn.Sequential:
    """An MLP as a user of DeepSpeed writes it, with these weights and biases."""
    first, first_bias, second, second_bias = (one.detach().clone() for one in parameters)
    layers = (torch.nn.Linear(*first.shape[::-1]), torch.nn.Linear(*second.shape[::-1]))
    for layer, weight, bias in zip(layers, (first, second), (first_bias, second_bias), strict=True):
        layer.weight.data, layer.bias.data = weight, bias
    return torch.nn.Sequential(layers[0], torch.nn.GELU(approximate="tanh"), layers[1])


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
