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
from torch.overrides import TorchFunctionMode

from moe_bench.harness.host_device import cuda_substitutions, is_cuda
from moe_bench.harness.substitution import substituted

META = "meta"


@contextlib.contextmanager
def meta_device() -> Iterator[None]:
    """Let code that was written for CUDA run on tensors without data, until the block ends."""
    with contextlib.ExitStack() as stack:
        for substitution in cuda_substitutions(META):
            stack.enter_context(substituted(substitution))
        # Functions that were compiled when Megatron-Core was imported run as they are written.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(CudaMeansMeta())
        yield


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
        name = getattr(func, "__name__", "")
        if kwargs:
            if is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": META}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if name in _MOVES:
            if name == "pin_memory":
                return args[0]
            if name == "cuda":
                return args[0].to(META)
            if name == "to" and len(args) > 1 and is_cuda(args[1]):
                args = (args[0], META, *args[2:])
            if name == "type" and len(args) == 1 and not kwargs:
                # The optimizers sort parameters by CUDA's names of types (distrib_optimizer.py:384).
                return str(func(*args)).replace("torch.meta.", "torch.cuda.")
        elif func is torch.device and args and is_cuda(args[0]):
            return torch.device(META)
        return func(*args, **kwargs) if kwargs else func(*args)


_MOVES = frozenset({"to", "cuda", "type", "pin_memory"})
