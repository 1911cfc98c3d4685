"""Megatron-Core on a machine without a GPU: stand-ins for torch's CUDA calls, and gloo in NCCL's place.

Megatron-Core asks torch for CUDA devices, streams, events and random states, and asks its process groups for
collectives that NCCL alone has. Every substitution is one small function below, with its reason. None changes
arithmetic. Changes to Megatron-Core's own functions stand in `moe_bench.harness.patches` instead. This module
is imported only where there is no GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import param_and_grad_buffer as ddp_buffers
from megatron.core.distributed.fsdp.src.megatron_fsdp import param_and_grad_buffer as fsdp_buffers
from torch import distributed
from torch.overrides import TorchFunctionMode

from moe_bench.harness.substitution import Substitution, substituted

HOST = "cpu"


@contextlib.contextmanager
def host_device() -> Iterator[None]:
    """Let code that was written for CUDA and NCCL run on the CPU over gloo, until the block ends."""
    with contextlib.ExitStack() as stack:
        for substitution in (*cuda_substitutions(HOST), *_gloo_substitutions()):
            stack.enter_context(substituted(substitution))
        # jit_fuser is torch.compile, and inductor asks for the properties of a CUDA device.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(CudaMeansHost())
        yield


class HostStream:
    """A CUDA stream that is always idle: on the CPU every operation has ended when its call returns."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        del args, kwargs

    def wait_stream(self, stream: HostStream) -> None:
        """Return at once."""

    def wait_event(self, event: HostEvent) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Say that all work is done."""
        return True

    def record_event(self, event: HostEvent | None = None) -> HostEvent:
        """Return an event that has already happened."""
        return event or HostEvent()

    def __enter__(self) -> HostStream:
        return self

    def __exit__(self, *args: object) -> None:
        return None


class HostEvent:
    """A CUDA event that has always happened. It cannot time anything, so it has no `elapsed_time`."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        del args, kwargs

    def record(self, stream: HostStream | None = None) -> None:
        """Return at once."""

    def wait(self, stream: HostStream | None = None) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Say that the event has happened."""
        return True


class CudaMeansHost(TorchFunctionMode):
    """Reads `cuda` as `cpu` wherever torch is asked for a device, and leaves memory unpinned.

    Megatron-Core spells the device out in many places (`device="cuda"`, `.cuda()`, `pin_memory=True`), and
    pinning needs a CUDA driver.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run `func` with every CUDA device among its arguments replaced by the host."""
        # Called thousands of times per step: what needs no change goes straight through.
        if kwargs:
            if is_cuda(kwargs.get("device")):
                kwargs = kwargs | {"device": HOST}
            if kwargs.get("pin_memory"):
                kwargs = kwargs | {"pin_memory": False}
        else:
            kwargs = {}
        name = getattr(func, "__name__", None)
        if name not in _MAY_NAME_CUDA:
            return func(*args, **kwargs)
        if func is torch.device and args and is_cuda(args[0]):
            return torch.device(HOST)
        if name in ("cuda", "pin_memory"):
            return args[0]
        if name == "to" and len(args) > 1 and is_cuda(args[1]):
            args = (args[0], HOST, *args[2:])
        if name == "type" and len(args) == 1 and not kwargs:
            # The optimizers sort parameters by the names that CUDA tensors have (distrib_optimizer.py:384).
            return str(func(*args)).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


_MAY_NAME_CUDA = frozenset(("cuda", "device", "pin_memory", "to", "type"))
"""Functions that take a device by position, or give one back."""


def is_cuda(device: object) -> bool:
    """Whether a device, given as torch takes it, is a GPU."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def cuda_substitutions(device: str | int) -> tuple[Substitution, ...]:
    """Stand-ins for `torch.cuda`: `device` as its device, one idle stream, the CPU's random generator."""
    stream = HostStream()
    return (
        Substitution(torch.cuda, "Stream", HostStream),
        Substitution(torch.cuda, "Event", HostEvent),
        Substitution(torch.cuda, "current_device", lambda: device),
        Substitution(torch.cuda, "current_stream", lambda device=None: stream),
        Substitution(torch.cuda, "default_stream", lambda device=None: stream),
        Substitution(torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
        Substitution(torch.cuda, "synchronize", _nothing),
        Substitution(torch.cuda, "set_device", _nothing),
        Substitution(torch.cuda, "empty_cache", _nothing),
        Substitution(torch.cuda, "is_current_stream_capturing", lambda: False),
        Substitution(torch.cuda, "memory_allocated", _no_bytes),
        Substitution(torch.cuda, "memory_reserved", _no_bytes),
        Substitution(torch.cuda, "_lazy_init", _nothing),
        Substitution(torch.cuda, "manual_seed", torch.manual_seed),
        Substitution(torch.cuda, "get_rng_state", _get_rng_state),
        Substitution(torch.cuda, "set_rng_state", _set_rng_state),
        Substitution(torch.cuda.random, "get_rng_state", _get_rng_state),
        Substitution(torch.cuda.random, "set_rng_state", _set_rng_state),
        Substitution(torch.nn.Module, "cuda", lambda module, device=None: module),
        Substitution(torch.Tensor, "record_stream", _nothing),
    )


def _nothing(*args: object, **kwargs: object) -> None:
    del args, kwargs


def _no_bytes(device: object = None) -> int:
    return 0


def _get_rng_state(device: object = HOST) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: object = HOST) -> None:
    torch.set_rng_state(new_state)


def _gloo_substitutions() -> tuple[Substitution, ...]:
    """Collectives that NCCL accepts and gloo refuses, rewritten in terms of ones that gloo has."""
    return (
        Substitution(
            distributed, "all_to_all_single", _all_to_all_with_list_splits(distributed.all_to_all_single)
        ),
        Substitution(distributed, "all_gather", _all_gather_of_unequal_parts(distributed.all_gather)),
        Substitution(
            distributed, "reduce_scatter", _reduce_scatter_of_unequal_parts(distributed.reduce_scatter)
        ),
        *(
            Substitution(
                buffers, "_coalescing_manager", _waiting_coalescing_manager(buffers._coalescing_manager)
            )
            for buffers in (ddp_buffers, fsdp_buffers)
        ),
    )


def _waiting_coalescing_manager(manager: Callable[..., Any]) -> Callable[..., Any]:
    """Coalesced collectives end before the block does, also where the caller would wait for them later.

    Under Megatron-FSDP, gloo's background threads corrupted the heap in 6 of 150 short runs (torch 2.15,
    "malloc(): unaligned tcache chunk detected" in the wait for a coalesced all-gather).
    """

    @contextlib.contextmanager
    def hold(group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[Any]:
        with manager(group, device=device, async_ops=async_ops) as works:
            yield works
        works.wait()

    return hold


def _all_to_all_with_list_splits(all_to_all_single: Callable[..., Any]) -> Callable[..., Any]:
    """Gloo wants the split sizes as a list of int; the token dispatcher passes tensors."""

    def as_list(sizes: object) -> object:
        return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes

    def call(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: object = None,
        input_split_sizes: object = None,
        group: object = None,
        async_op: bool = False,
    ) -> Any:
        return all_to_all_single(
            output,
            input,
            output_split_sizes=as_list(output_split_sizes),
            input_split_sizes=as_list(input_split_sizes),
            group=group,
            async_op=async_op,
        )

    return call


def _all_gather_of_unequal_parts(all_gather: Callable[..., Any]) -> Callable[..., Any]:
    """Gloo wants equal parts; expert tensor parallelism gathers as many tokens as each rank has."""

    def call(
        tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        sizes = {part.shape[0] for part in tensor_list if part.dim() > 0}
        if len(sizes) <= 1:
            return all_gather(tensor_list, tensor, group=group, async_op=async_op)
        padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        parts = [torch.empty_like(padded) for _ in tensor_list]
        all_gather(parts, padded, group=group)
        for whole, part in zip(tensor_list, parts, strict=True):
            whole.copy_(part[: whole.shape[0]])
        return None

    return call


def _reduce_scatter_of_unequal_parts(reduce_scatter: Callable[..., Any]) -> Callable[..., Any]:
    """The counterpart of the unequal gather: reduce all parts everywhere, and keep this rank's."""

    def call(
        output: torch.Tensor,
        input_list: list[torch.Tensor],
        op: Any = distributed.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        sizes = [part.shape[0] for part in input_list if part.dim() > 0]
        if len(set(sizes)) <= 1:
            return reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
        whole = torch.cat([part.contiguous() for part in input_list])
        distributed.all_reduce(whole, op=op, group=group)
        output.copy_(whole.split(sizes)[distributed.get_rank(group)])
        return None

    return call
