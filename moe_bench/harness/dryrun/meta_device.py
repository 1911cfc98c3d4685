"""CUDA tensors become `meta` tensors: shapes and lifetimes of the real run, no values and no memory.

What the code puts on the GPU goes to the `meta` device, what it keeps on the host stays real, so the line
between the two runs where it runs in the real job. A number that the host reads back from the device is 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch._dynamo
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler
from torch.overrides import TorchFunctionMode

from moe_bench.harness.host_device import cuda_substitutions, is_cuda
from moe_bench.harness.substitution import substituted

META = "meta"
CURRENT_DEVICE = 0
"""What `torch.cuda.current_device()` says; a number where a device is asked for is a GPU."""
_IS_META: Any = torch.Tensor.is_meta


@contextlib.contextmanager
def meta_device() -> Iterator[None]:
    """Let code that was written for CUDA run on tensors without data, until the block ends."""
    with contextlib.ExitStack() as stack:
        for substitution in cuda_substitutions(CURRENT_DEVICE):
            stack.enter_context(substituted(substitution))
        # Functions that were compiled when Megatron-Core was imported run as they are written.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_own_loss_scales())
        stack.enter_context(CudaMeansMeta())
        yield


@contextlib.contextmanager
def _own_loss_scales() -> Iterator[None]:
    """Megatron-Core keeps the scales of auxiliary losses on classes, where they would stay without values."""
    scalers = (MoEAuxLossAutoScaler, MTPLossAutoScaler)
    before = [scaler.main_loss_backward_scale for scaler in scalers]
    MoEAuxLossAutoScaler.main_loss_backward_scale = None  # a new one is made where the loss is
    try:
        yield
    finally:
        for scaler, scale in zip(scalers, before, strict=True):
            scaler.main_loss_backward_scale = scale


def has_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor is on the host; `is_meta` says False of all tensors here."""
    return tensor.device.type != META


class CudaMeansMeta(TorchFunctionMode):
    """Reads `cuda` as `meta` wherever torch is asked for a device, and leaves memory unpinned."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run `func` with every CUDA device among its arguments replaced."""
        kwargs = _without_cuda(kwargs) if kwargs else {}
        special = _SPECIAL.get(getattr(func, "__name__", ""))
        if special is not None:
            return special(self, func, args, kwargs)
        return func(*args, **kwargs)


def _without_cuda(options: dict[str, Any]) -> dict[str, Any]:
    if _is_gpu(options.get("device")):
        options = {**options, "device": META}
    if options.get("pin_memory"):
        options = {**options, "pin_memory": False}
    return options


def _is_gpu(device: object) -> bool:
    return is_cuda(device) or (isinstance(device, int) and not isinstance(device, bool))


Special = Callable[[CudaMeansMeta, Any, tuple[Any, ...], dict[str, Any]], Any]


def _get(mode: CudaMeansMeta, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An attribute of a tensor; Megatron-FSDP takes parameters that are meta for not yet materialised."""
    return False if func.__self__ is _IS_META else func(*args, **kwargs)


def _to(mode: CudaMeansMeta, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) > 1 and _is_gpu(args[1]):
        args = (args[0], META, *args[2:])
    return func(*args, **kwargs)


def _cuda(mode: CudaMeansMeta, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0].to(META)


def _pin_memory(mode: CudaMeansMeta, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0]


def _type(mode: CudaMeansMeta, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Name of a tensor's type: the optimizers sort parameters by CUDA's (distrib_optimizer.py:384)."""
    found = func(*args, **kwargs)
    return found.replace("torch.meta.", "torch.cuda.") if isinstance(found, str) else found


def _tolist(mode: CudaMeansMeta, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor = args[0]
    return func(*args, **kwargs) if has_values(tensor) else torch.ones(tensor.shape).long().tolist()


def _device(mode: CudaMeansMeta, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return torch.device(META) if args and _is_gpu(args[0]) else func(*args, **kwargs)


def _backward(mode: CudaMeansMeta, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """torch.autograd.backward, which recomputation calls: a mode is off inside functions that it runs."""
    if func is not torch.autograd.backward:
        return func(*args, **kwargs)
    tensors, grad_tensors = (*args, kwargs.get("grad_tensors"))[:2]
    grads = torch.autograd._tensor_or_tensors_to_tuple(grad_tensors, len(tensors))
    grads = torch.autograd._make_grads(tensors, grads, is_grads_batched=False)
    with mode:
        torch.autograd.graph._engine_run_backward(
            tensors, grads, False, False, (), allow_unreachable=True, accumulate_grad=True
        )
    return None


_SPECIAL: dict[str, Special] = {
    "__get__": _get,
    "to": _to,
    "cuda": _cuda,
    "pin_memory": _pin_memory,
    "type": _type,
    "tolist": _tolist,
    "device": _device,
    "backward": _backward,
}
