"""Runs Megatron-Core's own schedule functions rank by rank with recorders for passes and transfers.

Nothing is computed or sent: a pass makes a named object, a send puts it on the link, a receive makes an
object whose name is found when all ranks have run, since links keep their order.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel import combined_1f1b, p2p_communication, schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection

from moe_bench.projection.schedule.simulation import ScheduleKind, ScheduleShape, TransferRule


@dataclass(eq=False)
class Sent:
    """What a pass made: `F` or `B`, chunk, micro batch."""

    name: tuple[str, int, int]


@dataclass(eq=False)
class Received:
    """What a link delivers as its `place`-th tensor."""

    link: tuple[int, int]
    place: int


@dataclass
class Event:
    """A pass (`work`) or a posted transfer, and what the rank has waited for since the event before it."""

    awaited: frozenset[object]
    work: tuple[tuple[str, int, int], ...] = ()
    reads: tuple[object, ...] = ()
    sends: tuple[object, ...] = ()
    receives: tuple[object, ...] = ()


@dataclass
class Recorder:
    """One rank."""

    shape: ScheduleShape
    rank: int
    events: list[Event] = field(default_factory=list)
    awaited: list[object] = field(default_factory=list)
    """Since the last event."""
    ever_awaited: set[object] = field(default_factory=set)
    links: dict[tuple[int, int], list[object]] = field(default_factory=lambda: defaultdict(list))
    """What this rank sent on each link, in order."""
    num_received: dict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(int))
    num_forward: dict[int, int] = field(default_factory=lambda: defaultdict(int))

    def chunk(self, virtual_stage: int | None) -> int:
        return (virtual_stage or 0) * self.shape.num_ranks + self.rank

    def compute(self, work: tuple[tuple[str, int, int], ...], reads: tuple[object, ...]) -> None:
        self.events.append(Event(self._newly_awaited(), work=work, reads=reads))

    def wait(self, tensor: object) -> None:
        if tensor not in self.ever_awaited:
            self.ever_awaited.add(tensor)
            self.awaited.append(tensor)

    def _newly_awaited(self) -> frozenset[object]:
        newly = frozenset(self.awaited)
        self.awaited.clear()
        return newly

    def post(self, sends: dict[int, object], receives: list[int]) -> list[Received]:
        """`sends` by neighbour, forward (+1) or backward (-1); `receives` from the neighbours named."""
        received = []
        for step in receives:
            link = ((self.rank + step) % self.shape.num_ranks, step)
            received.append(Received(link, self.num_received[link]))
            self.num_received[link] += 1
        for step, tensor in sends.items():
            self.links[self.rank, -step].append(tensor)
        if sends or receives:
            self.events.append(
                Event(self._newly_awaited(), sends=tuple(sends.values()), receives=tuple(received))
            )
        return received


class RecordedLinks(P2PCommunicator):
    """Megatron-Core's communicator down to the place where it would call NCCL."""

    def __init__(self, recorder: Recorder, config: ModelParallelConfig) -> None:
        shape = recorder.shape
        self.pp_group = SimpleNamespace(rank=lambda: recorder.rank, size=lambda: shape.num_ranks)
        self.config, self.recorder = config, recorder
        self.virtual_pipeline_model_parallel_size = config.virtual_pipeline_model_parallel_size

    def _communicate(
        self,
        *,
        tensor_send_next,
        tensor_send_prev,
        recv_prev,
        recv_next,
        tensor_shape,
        wait_on_reqs=True,
    ):
        sends = {
            step: one for step, one in ((1, tensor_send_next), (-1, tensor_send_prev)) if one is not None
        }
        asked = [step for step, is_asked in ((-1, recv_prev), (1, recv_next)) if is_asked]
        received = dict(zip(asked, self.recorder.post(sends, asked), strict=True))
        waits = {
            name: SimpleNamespace(wait=lambda one=one: self.recorder.wait(one))
            for name, one in (
                ("send_next", sends.get(1)),
                ("recv_prev", received.get(-1)),
                ("send_prev", sends.get(-1)),
                ("recv_next", received.get(1)),
            )
            if one is not None
        }
        if wait_on_reqs:
            for wait in waits.values():
                wait.wait()
        return received.get(-1), received.get(1), None if wait_on_reqs else waits


def recorded(shape: ScheduleShape, rule: TransferRule) -> tuple[list[Event], ...]:
    """What every rank does under Megatron-Core, tensors by name: `F` or `B`, chunk, micro batch."""
    recorders = [_run(shape, rule, rank) for rank in range(shape.num_ranks)]
    links = {link: sent for recorder in recorders for link, sent in recorder.links.items()}

    def name(tensor: object) -> object:
        if isinstance(tensor, Received):
            tensor = links[tensor.link][tensor.place]
        assert isinstance(tensor, Sent)
        return tensor.name

    return tuple(
        [
            Event(
                frozenset(map(name, event.awaited)),
                event.work,
                tuple(map(name, event.reads)),
                tuple(map(name, event.sends)),
                tuple(map(name, event.receives)),
            )
            for event in recorder.events
        ]
        for recorder in recorders
    )


def _run(shape: ScheduleShape, rule: TransferRule, rank: int) -> Recorder:
    recorder = Recorder(shape, rank)
    interleaves = shape.num_virtual > 1
    config = ModelParallelConfig(
        pipeline_dtype=torch.float32,
        overlap_p2p_comm=rule.overlaps,
        batch_p2p_comm=not rule.overlaps,
        batch_p2p_sync=False,
        deallocate_pipeline_outputs=rule.waits_for_sends,
        microbatch_group_size_per_vp_stage=shape.group_size,
        virtual_pipeline_model_parallel_size=shape.num_virtual if interleaves else None,
        pipeline_model_parallel_size=shape.num_ranks,
    )
    config.hidden_size, config.high_priority_a2a_comm_stream = 1, False
    config.overlap_moe_expert_parallel_comm = shape.kind is ScheduleKind.INTERLEAVED_EP_OVERLAP
    model = [torch.nn.Module() for _ in range(shape.num_virtual)]
    for virtual_stage, module in enumerate(model):
        module.config, module.model_type, module.virtual_stage = config, None, virtual_stage
    groups = ProcessGroupCollection()
    groups.tp = groups.cp = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    run = (
        schedules.forward_backward_pipelining_with_interleaving
        if interleaves
        else schedules.forward_backward_pipelining_without_interleaving
    )
    with _recording(recorder):
        run(
            forward_step_func=None,
            data_iterator=[None] * shape.num_virtual,
            model=model,
            num_microbatches=shape.num_micro_batches,
            seq_length=1,
            micro_batch_size=1,
            p2p_communicator=RecordedLinks(recorder, config),
            pg_collection=groups,
        )
    return recorder


class CpuTorch:
    """torch, whose zeros stand on the CPU."""

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    def zeros(self, *sizes: object, **options: object) -> torch.Tensor:
        return torch.zeros(*sizes, **(options | {"device": "cpu"}))


@contextmanager
def _recording(recorder: Recorder) -> Iterator[None]:
    def forward(model: torch.nn.Module, micro_batch: int) -> Sent:
        return Sent(("F", recorder.chunk(model.virtual_stage), micro_batch))

    def forward_step(_f, _data, model, _n, input_tensor, *_rest, current_microbatch=None, **_more):
        made = forward(model, current_microbatch)
        recorder.compute((made.name,), _tensors(input_tensor))
        return made, 0

    def backward_step(_input, output_tensor, output_tensor_grad, _config):
        (of,) = _tensors(output_tensor)
        made = Sent(("B", *of.name[1:]))
        recorder.compute((made.name,), _tensors(output_tensor_grad))
        return made

    def combined(
        _f,
        _data,
        model,
        _n,
        input_tensor,
        _store,
        backward_model,
        _input,
        output_tensor,
        output_tensor_grad,
        _config,
        current_microbatch=None,
        **more,
    ):
        hooks = {name: more[name] or (lambda tensor=None, **_: tensor) for name in HOOKS}
        ahead = back = None
        if model is not None:
            hooks["pre_forward"](vp_stage=model.virtual_stage)
            ahead = forward(model, current_microbatch)
        if backward_model is not None:
            hooks["pre_backward"](vp_stage=backward_model.virtual_stage)
            back = Sent(("B", *output_tensor.name[1:]))
        reads = (*_tensors(input_tensor), *_tensors(output_tensor_grad))
        recorder.compute(tuple(one.name for one in (ahead, back) if one is not None), reads)
        if ahead is not None:
            hooks["post_forward"](ahead, vp_stage=model.virtual_stage)
        if back is not None:
            hooks["post_backward"](back, vp_stage=backward_model.virtual_stage)
        return ahead, 0, back

    def merged(*arguments: object, **options: object) -> object:
        return combined(*arguments, **options)

    ends = {  # Megatron-Core asks torch.distributed, which is not running
        "is_pp_first_stage": lambda group: group.rank() == 0,
        "is_pp_last_stage": lambda group: group.rank() == group.size() - 1,
    }
    with (
        mock.patch.multiple(p2p_communication, **ends),
        mock.patch.multiple(
            schedules,
            **ends,
            torch=CpuTorch(),
            forward_step=forward_step,
            backward_step=backward_step,
            deallocate_output_tensor=lambda *_: None,
        ),
        mock.patch.multiple(
            combined_1f1b,
            set_streams=lambda **_: None,
            combined_forward_backward_step=merged,
            find_megatron_fsdp=lambda _: None,
        ),
    ):
        yield


HOOKS = ("pre_forward", "pre_backward", "post_forward", "post_backward")


def _tensors(one: object) -> tuple[object, ...]:
    """What is there of a tensor, a list of one, or nothing."""
    listed = one if isinstance(one, list) else [one]
    return tuple(tensor for tensor in listed if tensor is not None)
