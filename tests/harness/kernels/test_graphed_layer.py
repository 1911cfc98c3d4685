"""What a CUDA graph of the layer is refused for, what a capture leaves, and on a GPU what it computes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoEFlexTokenDispatcher,
)
from torch import Tensor

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.kernels.fused.dispatchers import FusedAlltoAllDispatcher
from moe_bench.harness.kernels.graphed_layer import capture_obstacle, captured
from moe_bench.harness.layer.megatron import engine_named, expert_layer
from moe_bench.harness.layer.weights import draw_weights
from moe_bench.spec.catalogue import recipes_root
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Fusions, KernelSpec
from tests.harness.layer.peers.cases import small_case

FUSED = KernelSpec(family="torch_native", fusions=Fusions(permute=True, activation=True))


def dispatcher(
    kind: type = FusedAlltoAllDispatcher,
    *,
    ranks: int = 1,
    capacity_factor: float | None = None,
    is_padded: bool = False,
) -> Any:
    """One with just what decides; nothing is built."""
    made = object.__new__(kind)
    made.config = SimpleNamespace(moe_expert_capacity_factor=capacity_factor)
    made.ep_size, made.tp_size, made.drop_and_pad, made.capacity = ranks, 1, is_padded, 3
    return made


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (dispatcher(MoEAllGatherTokenDispatcher), "use alltoall"),
        (dispatcher(MoEFlexTokenDispatcher), "number of tokens that arrive; use alltoall"),
        (dispatcher(ranks=8), "how much it sends to each rank; set token_drop.pad_to_capacity"),
        (dispatcher(capacity_factor=1.0), "within the capacity is read; set token_drop.pad_to_capacity"),
        (dispatcher(MoEAlltoAllTokenDispatcher), "set kernels.fusions.permute: true"),
    ],
)
def test_what_the_host_would_have_to_read_is_named_with_what_to_change(refused: Any, words: str) -> None:
    obstacle = capture_obstacle(refused)
    assert obstacle is not None
    assert words in obstacle
    with pytest.raises(MissingRequirementError, match="a CUDA graph of the MoE layer: "):
        captured(Layer(refused), torch.randn(4, 1, 8), cuda=Cuda())


@pytest.mark.parametrize(
    "fixed",
    [
        dispatcher(),
        dispatcher(ranks=8, capacity_factor=1.0, is_padded=True),
        dispatcher(MoEAlltoAllTokenDispatcher, ranks=8, capacity_factor=1.0, is_padded=True),
    ],
)
def test_fixed_numbers_of_rows_can_be_captured(fixed: Any) -> None:
    assert capture_obstacle(fixed) is None


class Layer(torch.nn.Module):
    """A layer that counts its passes in a buffer and adds its weight's gradient to `main_grad` itself."""

    def __init__(self, token_dispatcher: Any, *, waits: bool = False, bias: Tensor | None = None) -> None:
        super().__init__()
        self.token_dispatcher, self.waits, self.bias = token_dispatcher, waits, bias
        self.weight = torch.nn.Parameter(torch.randn(8, 8))
        self.weight.main_grad = torch.ones(8, 8)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        self.count += 1
        self.weight.main_grad += 1
        if self.waits and Cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return x @ self.weight, self.bias


class Cuda:
    """torch.cuda as far as a capture asks it, on a machine without a GPU."""

    mode: Any = "default"

    def __init__(self, *, has_gpu: bool = True) -> None:
        self.has_gpu = has_gpu
        self.captures: list[tuple[torch.nn.Module, tuple[Tensor, ...], bool]] = []
        Cuda.mode = "default"

    def is_available(self) -> bool:
        return self.has_gpu

    def get_sync_debug_mode(self) -> Any:
        return Cuda.mode

    def set_sync_debug_mode(self, mode: Any) -> None:
        Cuda.mode = mode

    def make_graphed_callables(
        self, module: torch.nn.Module, sample: tuple[Tensor, ...], *, allow_unused_input: bool
    ) -> torch.nn.Module:
        assert Cuda.mode == "default"
        self.captures.append((module, sample, allow_unused_input))
        module(*sample)
        return module


def test_a_capture_leaves_counts_as_they_were_and_sums_at_zero() -> None:
    layer, cuda, x = Layer(dispatcher()), Cuda(), torch.randn(4, 1, 8)
    graphed = captured(layer, x, cuda=cuda)
    assert [(sample[0] is x, unused) for _, sample, unused in cuda.captures] == [(True, True)]
    assert (layer.count.item(), layer.weight.main_grad.abs().sum().item()) == (0, 0)
    assert layer.weight.grad is None
    output = graphed(x)
    assert torch.equal(output, x @ layer.weight)


def test_a_wait_inside_the_layer_is_refused_with_the_place_where_it_is() -> None:
    cuda = Cuda()
    with pytest.raises(
        MissingRequirementError, match=r"waits for the device in .*test_graphed_layer\.py:\d+"
    ):
        captured(Layer(dispatcher(), waits=True), torch.randn(4, 1, 8), cuda=cuda)
    assert Cuda.mode == "default"
    assert not cuda.captures


def test_another_failure_of_the_layer_is_not_called_a_wait() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        captured(Layer(dispatcher()), torch.randn(4, 1, 7), cuda=Cuda())


def test_a_bias_that_is_left_to_add_is_refused() -> None:
    with pytest.raises(MissingRequirementError, match="leave a bias to be added"):
        captured(Layer(dispatcher(), bias=torch.zeros(8)), torch.randn(4, 1, 8), cuda=Cuda())


def test_without_a_gpu_nothing_is_captured() -> None:
    with pytest.raises(MissingRequirementError, match="torch sees no GPU"):
        captured(Layer(dispatcher()), torch.randn(4, 1, 8), cuda=Cuda(has_gpu=False))


def test_padded_counts_are_made_on_the_device_of_the_routing_map() -> None:
    """Megatron-Core writes them on the host; a replay would read that memory after it is freed."""
    padded = dispatcher(ranks=8, capacity_factor=1.0, is_padded=True)
    on_host = torch.full((5,), 24)
    padded.preprocess = lambda routing_map: on_host
    captured(Layer(padded), torch.randn(4, 1, 8), cuda=Cuda())
    counts = padded.preprocess(torch.empty(4, 40, dtype=torch.bool, device="meta"))
    assert counts.device.type == "meta"
    assert (counts.shape, counts.dtype) == (on_host.shape, on_host.dtype)
    assert padded.preprocess(torch.empty(4, 40, dtype=torch.bool)).tolist() == [24] * 5


@pytest.mark.gpu("CUDA graphs capture on a GPU alone")
@pytest.mark.parametrize("model", ["qwen3_30b_a3b", "deepseek_v3"])
def test_replays_compute_what_the_layer_does_on_inputs_that_route_otherwise(model: str) -> None:
    case = small_case(model, precision="bf16", num_tokens=512, kernels=FUSED)
    system = Loader(root=recipes_root()).system("h100_sxm")
    with engine_named("torch_native", system).build(
        case, draw_weights(case, device="cuda"), device="cuda"
    ) as built:
        layer = expert_layer(built)
        inputs = [torch.randn(512, 1, case.hidden_size).bfloat16().cuda() for _ in range(3)]
        eager = [both_passes(lambda x: layer(x)[0], x, layer) for x in inputs]
        graphed = captured(layer, inputs[0].clone().requires_grad_())
        for x, expected in zip(inputs, eager, strict=True):
            for found, truth in zip(both_passes(graphed, x, layer), expected, strict=True):
                torch.testing.assert_close(found, truth, rtol=2e-2, atol=2e-2)


def both_passes(forward: Callable[[Tensor], Tensor], x: Tensor, layer: torch.nn.Module) -> tuple[Tensor, ...]:
    """Output, and gradients of input and weights, as copies."""
    x = x.clone().requires_grad_()
    for parameter in layer.parameters():
        parameter.grad = None
    output = forward(x)
    output.backward(torch.ones_like(output))
    gradients = [x.grad, *(parameter.grad for parameter in layer.parameters())]
    return (output.detach().clone(), *(one.clone() for one in gradients if one is not None))
