"""How many tokens go where, without data: balanced over the experts, or as a matrix of counts says.

Megatron-Core reads the number of tokens per expert back to the host before it exchanges or sorts them.
Without data there is nothing to read, so for that method the all-to-all dispatcher is given a real routing
map on the host; everything that it derives (splits, tokens per local expert, the gather of the counts) is its
own. The all-gather dispatcher, which has everyone's tokens by then, is told how many of them its experts get.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moe_bench.errors import BadInputError
from moe_bench.harness.kernels.fused.dispatchers import FusedAllGatherDispatcher
from moe_bench.harness.substitution import Substitution, substituted

SenderCounts = Sequence[Sequence[int]]
"""For each rank of the ETP x EP group, the tokens of one micro batch that it sends to each expert."""


@contextlib.contextmanager
def token_counts(counts: SenderCounts | None) -> Iterator[None]:
    """Let the dispatcher of every layer see these counts, until the block ends.

    None balances: every expert gets as many tokens of a sender as any other, give or take one, and so does
    every rank wherever that is possible.
    """
    exchange = MoEAlltoAllTokenDispatcher
    with contextlib.ExitStack() as stack:
        preprocess = _with_host_map(exchange.preprocess, counts)
        stack.enter_context(substituted(Substitution(exchange, "preprocess", preprocess)))
        for gather in (MoEAllGatherTokenDispatcher, FusedAllGatherDispatcher):
            postprocess = _with_known_rows(gather.dispatch_postprocess, counts)
            stack.enter_context(substituted(Substitution(gather, "dispatch_postprocess", postprocess)))
        yield


def balanced_counts(*, num_tokens: int, num_experts: int, top_k: int, sender: int) -> tuple[int, ...]:
    """Tokens for each of E experts when a sender's T = `num_tokens` `top_k` choices are spread evenly.

    Expert e gets floor((e + s + 1) T / E) - floor((e + s) T / E) from sender s: T over all experts, T / E up
    or down to a whole number for each, and as much over any run of senders or of neighbouring experts. So
    what an expert receives is even too, and what a rank sends and receives wherever T / E of its experts is a
    whole number.
    """
    choices = num_tokens * top_k
    edges = [(expert + sender) * choices // num_experts for expert in range(num_experts + 1)]
    return tuple(end - start for start, end in itertools.pairwise(edges))


def host_routing_map(counts: Sequence[int], *, num_tokens: int) -> torch.Tensor:
    """A boolean map [num_tokens, experts] on the host with these column sums and equal row sums.

    Experts take tokens in turn, one after the other, so no token goes to one expert twice.
    """
    total = sum(counts)
    expert = torch.repeat_interleave(torch.tensor(counts))
    token = torch.arange(total) % num_tokens
    routing_map = torch.zeros(num_tokens, len(counts), dtype=torch.bool)
    routing_map[token, expert] = True
    return routing_map


def _with_host_map(
    preprocess: Callable[..., torch.Tensor], counts: SenderCounts | None
) -> Callable[..., torch.Tensor]:
    prepared: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    """By number of tokens and of experts, as all layers of a job share the rest: this rank's map, and
    everyone's counts."""

    def call(self: Any, routing_map: torch.Tensor) -> torch.Tensor:
        if self.drop_and_pad:
            return preprocess(self, routing_map)
        num_tokens, _ = key = tuple(routing_map.shape)
        if key not in prepared:
            senders = _senders(self, counts, num_tokens=num_tokens)
            own_map = host_routing_map(senders[self.tp_ep_group.rank()], num_tokens=num_tokens)
            prepared[key] = own_map, torch.tensor(senders).flatten()
        own_map, everyone = prepared[key]
        with _on_host(everyone):
            tokens_per_expert = preprocess(self, own_map)
        for name in ("input_splits", "output_splits"):
            splits = getattr(self, name, None)
            if isinstance(splits, torch.Tensor):
                # As on a GPU, whose splits arrive on the host as NumPy arrays (token_dispatcher.py:930).
                setattr(self, name, splits.tolist())
        return tokens_per_expert

    return call


def _with_known_rows(
    postprocess: Callable[..., Any], counts: SenderCounts | None
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def call(self: Any, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        num_tokens = hidden_states.shape[0] // self.tp_ep_group.size()
        senders = _senders(self, counts, num_tokens=num_tokens)
        rows = [sum(sent[expert] for sent in senders) for expert in self.local_expert_indices]
        with _KnownRows(rows):
            return postprocess(self, hidden_states, probs)

    return call


class _KnownRows(TorchFunctionMode):
    """Answers how many rows each local expert has, and selects that many, where torch would read values."""

    def __init__(self, rows: Sequence[int]) -> None:
        super().__init__()
        self._rows = rows

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "cpu":
            return torch.tensor(self._rows)
        if name == "masked_select":
            return _MaskedSelect.apply(*args, sum(self._rows))
        return func(*args, **kwargs or {})


class _MaskedSelect(torch.autograd.Function):
    """`masked_select` of a known number of values; keeps what torch keeps, values and mask."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, mask: Tensor, num_selected: int) -> Tensor:
        ctx.save_for_backward(values, mask)
        return values.new_empty(num_selected)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        values, _ = ctx.saved_tensors
        return torch.empty_like(values), None, None


def _senders(dispatcher: Any, counts: SenderCounts | None, *, num_tokens: int) -> tuple[tuple[int, ...], ...]:
    """Counts of every rank of the group, with what exceeds an expert's capacity dropped."""
    config, num_ranks = dispatcher.config, dispatcher.tp_ep_group.size()
    num_experts, top_k = config.num_moe_experts, config.moe_router_topk
    if counts is None:
        senders = [
            balanced_counts(num_tokens=num_tokens, num_experts=num_experts, top_k=top_k, sender=sender)
            for sender in range(num_ranks)
        ]
    else:
        senders = [tuple(row) for row in counts]
        _require_counts(senders, num_ranks=num_ranks, num_experts=num_experts, num_choices=num_tokens * top_k)
    if config.moe_expert_capacity_factor is None:
        return tuple(senders)
    # A router with a capacity of its own has told the dispatcher (harness/routers.py).
    factor = getattr(dispatcher, "moe_expert_capacity_factor", config.moe_expert_capacity_factor)
    capacity = math.ceil(num_tokens * top_k / num_experts * factor)
    return tuple(tuple(min(count, capacity) for count in row) for row in senders)


def _require_counts(
    senders: Sequence[Sequence[int]], *, num_ranks: int, num_experts: int, num_choices: int
) -> None:
    """Raise BadInputError unless the matrix has one row per rank, one column per expert, and adds up."""
    if len(senders) != num_ranks or any(len(row) != num_experts for row in senders):
        widths = sorted({len(row) for row in senders})
        raise BadInputError(
            f"routing matrix: {len(senders)} rows of {widths} counts; one row for each of the {num_ranks} "
            f"ranks of the ETP x EP group and one count for each of the {num_experts} experts are needed"
        )
    for rank, row in enumerate(senders):
        if sum(row) != num_choices or min(row) < 0:
            raise BadInputError(
                f"routing matrix: row {rank} adds up to {sum(row)}; a micro batch makes {num_choices} choices"
            )


@contextlib.contextmanager
def _on_host(everyone: Tensor) -> Iterator[None]:
    """Let the dispatcher work on the host, and find all senders' counts where it gathers them."""
    gather = token_dispatcher.gather_from_sequence_parallel_region

    def gather_counts(*args: Any, **kwargs: Any) -> torch.Tensor:
        gathered: torch.Tensor = gather(*args, **kwargs)
        return gathered.copy_(everyone)

    with (
        substituted(Substitution(torch.cuda, "current_device", lambda: "cpu")),
        substituted(Substitution(token_dispatcher, "gather_from_sequence_parallel_region", gather_counts)),
    ):
        yield
