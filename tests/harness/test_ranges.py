"""Ranges: what a listener hears of forward and backward passes, and that nothing is there without one."""

from __future__ import annotations

import torch

from moe_bench.harness.ranges import bounded, heard_by, range_named


class _Heard:
    def __init__(self) -> None:
        self.events: list[str] = []

    def start(self, name: str) -> str:
        self.events.append(f"> {name}")
        return name

    def end(self, started: str) -> None:
        self.events.append(f"< {started}")


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        with range_named("square dgrad"):
            return 2 * x * grad


def test_a_part_is_heard_forward_and_backward_with_what_happens_inside() -> None:
    heard, x = _Heard(), torch.tensor([3.0], requires_grad=True)
    with heard_by(heard):
        y = bounded("outer", lambda a: bounded("square", _Square.apply, a) + 1, x)
        y.backward()
    assert x.grad is not None
    assert x.grad.item() == 6.0
    forward = ["> outer fwd", "> square fwd", "< square fwd", "< outer fwd"]
    inside = ["> square bwd", "> square dgrad", "< square dgrad", "< square bwd"]
    assert heard.events == [*forward, "> outer bwd", *inside, "< outer bwd"]


def test_a_part_of_several_tensors_ends_when_all_of_their_gradients_have_gone_out() -> None:
    heard = _Heard()
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    count = torch.arange(2)
    with heard_by(heard):
        total, product, same = bounded("part", lambda p, q, n: (p + q, p * q, n), a, b, count)
        (total.sum() + 2 * product.sum()).backward()
    assert same is count
    assert heard.events == ["> part fwd", "< part fwd", "> part bwd", "< part bwd"]
    assert a.grad is not None
    assert a.grad.tolist() == [3.0, 3.0]


def test_without_a_listener_the_graph_has_no_further_node() -> None:
    x = torch.ones(1, requires_grad=True)
    y = bounded("part", lambda value: value * 2, x)
    assert type(y.grad_fn).__name__ == "MulBackward0"
    heard = _Heard()
    with heard_by(heard), torch.no_grad():
        bounded("part", lambda value: value * 2, x)
    assert heard.events == ["> part fwd", "< part fwd"]
