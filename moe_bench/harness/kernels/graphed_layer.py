"""One MoE layer, forward and backward, captured as CUDA graphs for a number of tokens that is fixed.

A graph replays kernels with the sizes and addresses of its capture, and the host takes no part in it. So what
the host would have to read off the device inside the layer rules a capture out (`capture_obstacle`):

| dispatcher | captured |
|---|---|
| all-to-all, every token kept | one rank; not with Megatron-Core's own permutation, which reads the counts |
| all-to-all, padded to capacity | over any number of ranks: every expert has the same number of rows |
| all-to-all, capacity without padding | no: the number of rows that are left |
| all-to-all over several ranks | no: what it sends to each |
| all-gather | no: the number of rows of its experts |
| DeepEP, HybridEP | no: the number of tokens that arrive |

The routing itself may change from replay to replay. Whatever else waits is found by torch's own check in a
pass before the capture, and named.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoETokenDispatcher,
)
from torch import Tensor

from moe_bench.errors import MissingRequirementError

_SUBJECT = "a CUDA graph of the MoE layer"


def capture_obstacle(dispatcher: MoETokenDispatcher) -> str | None:
    """What the host would have to read inside a layer with this dispatcher, and what to change; None if
    nothing.
    """
    if isinstance(dispatcher, MoEAllGatherTokenDispatcher):
        return "the all-gather dispatcher reads the number of its experts' rows; use alltoall"
    if not isinstance(dispatcher, MoEAlltoAllTokenDispatcher):
        return f"{type(dispatcher).__name__} reads the number of tokens that arrive; use alltoall"
    if dispatcher.drop_and_pad:
        return None
    if dispatcher.config.moe_expert_capacity_factor is not None:
        return "the number of rows within the capacity is read; set token_drop.pad_to_capacity: true"
    if dispatcher.ep_size * dispatcher.tp_size > 1:
        return "the all-to-all reads how much it sends to each rank; set token_drop.pad_to_capacity: true"
    if type(dispatcher) is MoEAlltoAllTokenDispatcher:
        return "Megatron-Core's permutation reads the tokens per expert; set kernels.fusions.permute: true"
    return None


def require_capture(layer: torch.nn.Module, *, cuda: Any = torch.cuda) -> None:
    """Raise MissingRequirementError where `captured` is known to refuse this MoELayer of Megatron-Core."""
    if not cuda.is_available():
        raise MissingRequirementError(f"{_SUBJECT}: torch sees no GPU; there is nothing else to capture on")
    if (obstacle := capture_obstacle(layer.token_dispatcher)) is not None:
        raise MissingRequirementError(f"{_SUBJECT}: {obstacle}")


def captured(layer: torch.nn.Module, x: Tensor, *, cuda: Any = torch.cuda) -> Callable[[Tensor], Tensor]:
    """A function that replays `layer` on inputs like `x`, and its backward pass in theirs.

    Gradients that kernels add to `main_grad` start from zero afterwards; the layer's buffers are as before.
    The weights' addresses are those of now: what replaces a parameter instead of writing it is not seen.

    Args:
        layer: a MoELayer of Megatron-Core, on the GPU, without hooks of its own.
        x: [tokens, 1, hidden], of the number of tokens that all calls will have; requires its gradient if
            theirs do.
        cuda: torch.cuda, or for tests what stands in for it.

    Raises:
        MissingRequirementError: no GPU, or the host waits for the device inside the layer.
    """
    require_capture(layer, cuda=cuda)
    dispatcher = layer.token_dispatcher
    if dispatcher.drop_and_pad:
        dispatcher.preprocess = partial(_counts_on_device, dispatcher, dispatcher.preprocess)
    alone = _Output(layer)
    with _as_before(layer):
        _both_passes(alone, x)
        with _waits_are_refused(cuda):
            _both_passes(alone, x)
        # gradients that a kernel adds to the buffer itself come back as None
        graphed: Callable[[Tensor], Tensor] = cuda.make_graphed_callables(
            alone, (x,), allow_unused_input=True
        )
    return graphed


class _Output(torch.nn.Module):
    """The layer without the bias that it returns beside its output, since a graph's outputs are tensors."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output, bias = self.layer(x)
        if bias is not None:
            raise MissingRequirementError(f"{_SUBJECT}: its experts leave a bias to be added; capture others")
        return output


def _counts_on_device(
    dispatcher: MoEAlltoAllTokenDispatcher, preprocess: Callable[[Tensor], Tensor], routing_map: Tensor
) -> Tensor:
    """Rows of each local expert, which padding makes equal. Megatron-Core writes them on the host
    (token_dispatcher.py, preprocess), from where a replay would copy memory that is long free.
    """
    on_host = preprocess(routing_map)
    rows = dispatcher.capacity * dispatcher.tp_size * dispatcher.ep_size
    return torch.full_like(on_host, rows, device=routing_map.device)


def _both_passes(layer: torch.nn.Module, x: Tensor) -> None:
    output = layer(x)
    inputs = [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad]
    torch.autograd.grad(output, inputs, torch.ones_like(output), allow_unused=True)


@contextlib.contextmanager
def _waits_are_refused(cuda: Any) -> Iterator[None]:
    """Let torch stop at whatever waits for the device; it says so in a RuntimeError."""
    before = cuda.get_sync_debug_mode()
    cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        frames = list(_frames(error))
        raise MissingRequirementError(
            f"{_SUBJECT}: the host waits for the device in {frames[-1]}; use kernels that do not"
        ) from error
    finally:
        cuda.set_sync_debug_mode(before)


def _frames(error: BaseException) -> Iterator[str]:
    """File and line of every call down to the one that failed."""
    trace = error.__traceback__
    while trace is not None:
        yield f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next


@contextlib.contextmanager
def _as_before(layer: torch.nn.Module) -> Iterator[None]:
    """Undo what the passes before and in a capture leave: counts in buffers, sums in gradient buffers."""
    buffers = [(buffer, buffer.clone()) for buffer in layer.buffers()]
    try:
        yield
    finally:
        for buffer, value in buffers:
            buffer.copy_(value)
        for parameter in layer.parameters():
            if getattr(parameter, "main_grad", None) is not None:
                parameter.main_grad.zero_()
