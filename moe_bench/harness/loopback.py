"""Process groups that stand in for all ranks of a job inside one process, and a ledger of what they carry.

Every collective returns at once with the shapes and, as far as one rank can know them, the values of the real
one: other ranks are taken to hold what this rank holds. So an all-gather repeats the input, an all-to-all
returns this rank's share of it, a broadcast changes nothing. Sums are not multiplied by the number of ranks
(an all-reduce returns its input, a reduce-scatter a slice of it), which keeps values in range. What is
received from a pipeline neighbour is a fixed sequence of normally distributed values, which no row repeats
soon: kernels meet numbers as in training, not zeros. Outputs are filled without copies on the way, so that a
rank's peak memory stays its own. Tensors on the `meta` device have no values; for them only shapes and bytes
remain.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, distributed
from torch.futures import Future
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_bench.harness.process_groups import initialise_model_parallel
from moe_bench.harness.substitution import Substitution, substituted

BACKEND = "loopback"
META = "meta"
_PATTERN_LENGTH = 65_521
"""A prime, so that the pattern does not line up with rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """One collective or one message, as this rank started it.

    `num_bytes` are those of the output for an all-gather or a gather, of the input for a reduce-scatter, a
    scatter or an all-to-all (this rank's own share included), of the tensor for everything else.
    """

    op: str
    group: str
    group_size: int
    num_bytes: int
    outputs: tuple[Tensor, ...]


OnTransfer = Callable[[Transfer], None]
AroundCopies = Callable[[], contextlib.AbstractContextManager[None]]
"""Entered while a group fills outputs: time that a real group spends on its links."""


@dataclass(frozen=True, slots=True, order=True)
class LedgerKey:
    """What one line of a ledger adds up."""

    op: str
    group: str
    group_size: int
    phase: str
    place: str


@dataclass(slots=True)
class Traffic:
    """Calls and bytes of one line."""

    num_calls: int = 0
    num_bytes: int = 0


class Ledger:
    """Adds up transfers by collective, group, and where and when they were started."""

    def __init__(self, where: Callable[[], tuple[str, str]]) -> None:
        self._where = where
        self.lines: dict[LedgerKey, Traffic] = {}

    def record(self, transfer: Transfer) -> None:
        """Add one transfer under the phase and place that it happens in."""
        key = LedgerKey(transfer.op, transfer.group, transfer.group_size, *self._where())
        line = self.lines.setdefault(key, Traffic())
        line.num_calls += 1
        line.num_bytes += transfer.num_bytes

    def copied(self) -> dict[LedgerKey, Traffic]:
        """The lines as they stand now."""
        return {key: replace(line) for key, line in self.lines.items()}


@contextlib.contextmanager
def loopback_groups(
    *,
    world_size: int,
    rank: int,
    sizes: Mapping[str, Any],
    on_transfer: OnTransfer,
    around_copies: AroundCopies = contextlib.nullcontext,
) -> Iterator[None]:
    """Be rank `rank` of `world_size` in Megatron-Core's groups, alone, until the block ends.

    `sizes` is `MegatronArguments.parallel_state`. `on_transfer` is called for every transfer in a group of
    two or more, `around_copies` around the copies that fill its outputs.
    """
    create = partial(_create_group, on_transfer, around_copies)
    distributed.Backend.register_backend(BACKEND, create, extended_api=True, devices=["cpu", "cuda"])
    distributed.init_process_group(BACKEND, store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with (
            substituted(Substitution(distributed, "new_group", _without_backend(distributed.new_group))),
            substituted(Substitution(distributed, "broadcast_object_list", _keep_objects)),
        ):
            initialise_model_parallel(sizes)
            yield
    finally:
        parallel_state.destroy_model_parallel()
        distributed.destroy_process_group()


def _without_backend(new_group: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron-Core asks for gloo by name where hosts talk to one another; those groups are loopback too."""

    def call(*args: Any, backend: object = None, **kwargs: Any) -> Any:
        return new_group(*args, **kwargs)

    return call


def _keep_objects(*args: object, **kwargs: object) -> None:
    """The root's objects are taken to be this rank's; torch would wait for their size, which nobody sends."""


def group_label(description: str) -> str:
    """Megatron-Core's name of a group in the field's short form: `TP`, `EP`, `DPxCP`."""
    return _LABELS.get(description, description.removesuffix("_GROUP").lower())


_LABELS: Mapping[str, str] = {
    "TENSOR_MODEL_PARALLEL_GROUP": "TP",
    "PIPELINE_MODEL_PARALLEL_GROUP": "PP",
    "CONTEXT_PARALLEL_GROUP": "CP",
    "DATA_PARALLEL_GROUP": "DP",
    "DATA_PARALLEL_GROUP_WITH_CP": "DPxCP",
    "INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP": "DPxCP (one instance)",
    "DATA_PARALLEL_GROUP_WITH_CP_AG": "DPxCP (all-gather)",
    "EXPERT_MODEL_PARALLEL_GROUP": "EP",
    "EXPERT_TENSOR_PARALLEL_GROUP": "ETP",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "ETPxEP",
    "EXPERT_DATA_PARALLEL_GROUP": "EDP",
    "EXPERT_DATA_PARALLEL_GROUP_AG": "EDP (all-gather)",
    "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP": "ETPxEPxPP",
    "TENSOR_AND_CONTEXT_PARALLEL_GROUP": "TPxCP",
    "TENSOR_AND_DATA_PARALLEL_GROUP": "TPxDP",
    "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": "TPxDPxCP",
    "MODEL_PARALLEL_GROUP": "TPxPP",
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "optimizer instance",
    "HIERARCHICAL_EXPERT_DATA_PARALLEL_GROUP_L0": "EDP (one instance)",
    "HIERARCHICAL_EXPERT_DATA_PARALLEL_GROUP_L1": "optimizer instances",
    "EMBEDDING_GROUP": "embedding",
    "POSITION_EMBEDDING_GROUP": "position embedding",
    "default_pg": "world",
}


def _create_group(
    on_transfer: OnTransfer, around_copies: AroundCopies, options: Any, backend_options: object
) -> LoopbackGroup:
    del backend_options
    return LoopbackGroup(options.group_rank, options.group_size, on_transfer, around_copies)


class LoopbackGroup(distributed.ProcessGroup):
    """One process group seen from one of its ranks; nothing leaves the process.

    torch calls the methods below with positional arguments. Their names changed between releases, so each
    stands under all of them. Options (which reduction, asynchronous or not) make no difference here.
    """

    supports_coalescing = False

    def __init__(self, rank: int, size: int, on_transfer: OnTransfer, around_copies: AroundCopies) -> None:
        super().__init__(rank, size)
        self._rank, self._size, self._on_transfer = rank, size, on_transfer
        self._around_copies = around_copies
        self._name = self._description = ""
        self._patterns: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @property
    def group_name(self) -> str:
        """Name that torch finds the group by; its own property wants a backend in C++."""
        return self._name

    @property
    def group_desc(self) -> str:
        """What Megatron-Core calls the group."""
        return self._description

    def _set_group_name(self, name: str) -> None:
        self._name = name

    def _set_group_desc(self, description: str) -> None:
        self._description = description

    def allreduce(self, tensors: Sequence[Tensor], opts: object = None) -> Any:
        """Leave every tensor as it is."""
        return self._done("all_reduce", tensors, tensors)

    def broadcast(self, tensors: Sequence[Tensor], opts: object = None) -> Any:
        """Leave every tensor as it is: the root holds the same."""
        return self._done("broadcast", tensors, tensors)

    def reduce(self, tensors: Sequence[Tensor], opts: object = None) -> Any:
        """Leave every tensor as it is."""
        return self._done("reduce", tensors, tensors)

    def barrier(self, opts: object = None) -> Any:
        """Return at once."""
        return _finished()

    def all_gather_single(self, output: Tensor, input: Tensor, opts: object = None) -> Any:
        """Repeat the input along the first dimension; in place, leave the other ranks' parts as they are."""
        return self.all_gather_single_coalesced([output], [input])

    def all_gather_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: object = None
    ) -> Any:
        """The same for every input."""
        for output, input in zip(outputs, inputs, strict=True):
            if not _is_part_of(input, output):
                self._fill([output], input)
        return self._done("all_gather", outputs, outputs)

    def allgather(
        self, output_lists: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: object = None
    ) -> Any:
        """Copy each input to all its outputs; an output of another length takes its rows in turn."""
        outputs = [output for parts in output_lists for output in parts]
        for parts, input in zip(output_lists, inputs, strict=True):
            self._fill(parts, input)
        return self._done("all_gather", outputs, outputs)

    def gather(
        self, output_lists: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: object = None
    ) -> Any:
        """Copy each input to all its outputs, of which only the root has any."""
        for parts, input in zip(output_lists, inputs, strict=False):
            self._fill(parts, input)
        outputs = [output for parts in output_lists for output in parts]
        return self._done("gather", outputs or inputs, outputs)

    def scatter(
        self, outputs: Sequence[Tensor], input_lists: Sequence[Sequence[Tensor]], opts: object = None
    ) -> Any:
        """Take this rank's input on the root; elsewhere nothing is known but the shape."""
        for index, output in enumerate(outputs):
            if input_lists:
                self._fill([output], input_lists[index][self._rank])
            else:
                self._fill_pattern(output)
        return self._done("scatter", [part for parts in input_lists for part in parts] or outputs, outputs)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: object = None) -> Any:
        """Take this rank's slice."""
        return self.reduce_scatter_single_coalesced([output], [input])

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: object = None
    ) -> Any:
        """Take this rank's slice of every input."""
        for output, input in zip(outputs, inputs, strict=True):
            self._take_slice(output, input)
        return self._done("reduce_scatter", inputs, outputs)

    def reduce_scatter(
        self, outputs: Sequence[Tensor], input_lists: Sequence[Sequence[Tensor]], opts: object = None
    ) -> Any:
        """Take this rank's part of every list."""
        for output, parts in zip(outputs, input_lists, strict=True):
            self._fill([output], parts[self._rank])
        return self._done("reduce_scatter", [part for parts in input_lists for part in parts], outputs)

    def alltoall(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: object = None) -> Any:
        """Receive from every rank what this rank would send to itself."""
        self._fill(outputs, inputs[self._rank])
        return self._done("all_to_all", inputs, outputs)

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: Sequence[int],
        input_split_sizes: Sequence[int],
        opts: object = None,
    ) -> Any:
        """Receive from every rank what this rank would send to itself, in the lengths that were announced.

        Raises RuntimeError where splits do not add up to their tensor, as NCCL does.
        """
        output_parts = self._parts("output", output, output_split_sizes)
        input_parts = self._parts("input", input, input_split_sizes)
        own = input_parts[self._rank] if len(input_parts[self._rank]) else input
        is_even = {len(part) for part in output_parts} == {len(own)}
        # equal parts are written by one kernel, not by one for each rank
        self._fill([output] if is_even else output_parts, own)
        return self._done("all_to_all", [input], [output])

    def send(self, tensors: Sequence[Tensor], destination: int, tag: int = 0) -> Any:
        """Count the message."""
        return self._done("send", tensors, ())

    def recv(self, tensors: Sequence[Tensor], source: int, tag: int = 0) -> Any:
        """Fill the tensors with the module's pattern."""
        for tensor in tensors:
            self._fill_pattern(tensor)
        return self._done("recv", tensors, tensors)

    def recv_anysource(self, tensors: Sequence[Tensor], tag: int = 0) -> Any:
        """Fill the tensors with the module's pattern."""
        return self.recv(tensors, -1, tag)

    # torch 2.11 to 2.13 call the same operations by these names.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    allreduce_coalesced = allreduce

    def _start_coalescing(self, device: torch.device) -> None:
        """Messages of one batch are counted one by one."""

    def _end_coalescing(self, device: torch.device) -> Any:
        return _finished()

    def _get_backend(self, device: torch.device) -> LoopbackGroup:
        """torch asks the backend of a device whether it coalesces messages."""
        return self

    def shutdown(self) -> None:
        """There is nothing to close."""

    def abort(self) -> None:
        """There is nothing to close."""

    def getBackendName(self) -> str:  # noqa: N802  torch's name.
        """Name that torch prints."""
        return BACKEND

    def _parts(self, name: str, tensor: Tensor, split_sizes: Sequence[int]) -> Sequence[Tensor]:
        """The tensor cut for the ranks: by the splits, which may be a tensor themselves, or evenly."""
        num_rows = tensor.shape[0]
        splits = [int(size) for size in split_sizes] or [num_rows // self._size] * self._size
        if len(splits) != self._size or sum(splits) != num_rows:
            raise RuntimeError(
                f"all_to_all: {name} splits add up to {sum(splits)} rows over {len(splits)} ranks, the "
                f"tensor has {num_rows} over {self._size}"
            )
        return (tensor,) * self._size if tensor.device.type == META else tensor.split(splits)

    def _fill(self, outputs: Sequence[Tensor], input: Tensor) -> None:
        if any(output.device.type != META for output in outputs):
            with self._around_copies():
                for output in outputs:
                    _fill(output, input)

    def _fill_pattern(self, tensor: Tensor) -> None:
        if tensor.device.type == META:
            return
        key = tensor.device, tensor.dtype
        if key not in self._patterns:
            drawn = torch.randn(_PATTERN_LENGTH, generator=torch.Generator().manual_seed(0))
            self._patterns[key] = drawn.to(*key)
        self._fill([tensor], self._patterns[key])

    def _take_slice(self, output: Tensor, input: Tensor) -> None:
        if output.device.type != META:
            with self._around_copies():
                output.view(-1).copy_(input.reshape(self._size, -1)[self._rank])

    def _done(self, op: str, counted: Sequence[Tensor], outputs: Sequence[Tensor]) -> Any:
        if self._size > 1:
            self._on_transfer(
                Transfer(
                    op=op,
                    group=group_label(self._description),
                    group_size=self._size,
                    num_bytes=sum(tensor.numel() * tensor.element_size() for tensor in counted),
                    outputs=tuple(outputs),
                )
            )
        return _finished()


def _finished() -> Any:
    """A handle of work that is done."""
    future: Future[None] = Future()
    future.set_result(None)
    return torch._C._distributed_c10d._create_work_from_future(future)


def _fill(output: Tensor, input: Tensor) -> None:
    """Copy the input as often as it takes to fill the output, cut off at the end; nothing fits in nothing."""
    source, target = input.detach().reshape(-1), output.detach().view(-1)
    if not len(source):
        return
    num_repeated = len(target) // len(source) * len(source)
    target[:num_repeated].view(-1, len(source)).copy_(source.expand(num_repeated // len(source), -1))
    target[num_repeated:].copy_(source[: len(target) - num_repeated])


def _is_part_of(input: Tensor, output: Tensor) -> bool:
    """Whether a collective is in place, as where the distributed optimizer gathers its weights.

    The rest of the output is then the last that was known of the other ranks, and nearer to what they would
    send than this rank's share: a norm's weights are no part of a projection's.
    """
    return input.untyped_storage().data_ptr() == output.untyped_storage().data_ptr()
