"""The shapes that pipeline ranks tell one another where multi-token prediction stands on a stage of its own.

An MTP stage hands on the hidden states of the model and of its own layers one after another, so what passes
between it and the next stage is longer than elsewhere. Megatron-Core sends the shapes ahead (config field
`mtp_standalone`), which without values says nothing; here they follow from the order of the schedule.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from torch import Tensor

from moe_bench.harness.substitution import Substitution, substituted
from moe_bench.spec.pipeline import Chunk, pipeline_chunks
from moe_bench.spec.recipe import Recipe

Shape = list[int]


@contextlib.contextmanager
def known_shapes(recipe: Recipe, *, pipeline_rank: int, num_micro_batches: int) -> Iterator[None]:
    """Answer with the shapes that the neighbours of this pipeline rank would send, until the block ends."""
    received = _Received(recipe, pipeline_rank=pipeline_rank, num_micro_batches=num_micro_batches)
    exchange = P2PCommunicator._communicate_shapes

    def communicate_shapes(
        self: P2PCommunicator,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[Shape, Shape]:
        exchange(self, tensor_send_next, tensor_send_prev, recv_prev, recv_next)
        return received.next_forward(recv_prev), received.next_backward(recv_next)

    with substituted(Substitution(P2PCommunicator, "_communicate_shapes", communicate_shapes)):
        yield


class _Received:
    """Shapes in the order in which a rank receives them."""

    def __init__(self, recipe: Recipe, *, pipeline_rank: int, num_micro_batches: int) -> None:
        parallel = recipe.parallel
        chunks = pipeline_chunks(
            parallel, num_layers=recipe.model.num_layers, num_mtp_layers=recipe.num_mtp_layers
        )
        own = [index for index, chunk in enumerate(chunks) if chunk.pipeline_rank == pipeline_rank]
        table = get_schedule_table(
            num_micro_batches, len(own), parallel.micro_batch_group_size or parallel.pipeline
        )
        num_tokens = recipe.seq_len // parallel.context
        num_tokens //= parallel.tensor if parallel.sequence_parallel else 1
        self._row = [recipe.micro_batch_size, recipe.model.hidden_size]
        lengths = [num_tokens * _num_parts(chunks, index) for index in range(len(chunks))]
        # The first chunk receives nothing forward, the last nothing backward.
        self._forward = iter([lengths[own[c] - 1] for _, c in table if own[c] > 0])
        self._backward = iter([lengths[own[-1 - c]] for _, c in table if own[-1 - c] + 1 < len(chunks)])

    def next_forward(self, is_received: bool) -> Shape:
        """Shape of the next hidden states, zeros where none come."""
        return [next(self._forward), *self._row] if is_received else [0, 0, 0]

    def next_backward(self, is_received: bool) -> Shape:
        """Shape of the next gradients, zeros where none come."""
        return [next(self._backward), *self._row] if is_received else [0, 0, 0]


def _num_parts(chunks: Sequence[Chunk], index: int) -> int:
    """How many hidden states a chunk hands on: one more for each MTP layer so far."""
    return 1 + sum(chunk.num_mtp_layers for chunk in chunks[: index + 1])
