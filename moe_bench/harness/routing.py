"""Where tokens go: routers that deal them evenly or as recorded, and a count of what each expert got."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from megatron.core.transformer.cuda_graphs import is_graph_warmup
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from torch import distributed

from moe_bench.spec.routing_trace import Trace, dealt_counts

RouterBuilder = Callable[..., TopKRouter]
CHOSEN_LOGIT = 1.0
OTHER_LOGIT = -10.0


class RoundRobinRouter(TopKRouter):  # type: ignore[misc]
    """Sends token t of a micro batch to the k experts after those of token t - 1, modulo their number.

    This is what torchtitan (`debug.moe_force_load_balance`) and NeMo Automodel (`FakeBalancedGate`) call
    forced balance. Where the experts do not divide a rank's choices, it goes on where the rank before it
    ends, so that what they receive is even as well. The gate is still computed and trained: the logits are
    replaced on the way forward only, and the choice runs through Megatron-Core's own top-k, groups and
    scaling.
    """

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Logits [sequence, batch, experts] that make top-k choose in turn."""
        return round_robin_logits(
            super().gating(input), top_k=self.topk, num_ranks_before=self.tp_dp_cp_group.rank()
        )


def round_robin_logits(logits: torch.Tensor, *, top_k: int, num_ranks_before: int) -> torch.Tensor:
    """Logits [..., experts] whose top k are experts t * k to t * k + k - 1 of token t, modulo their number.

    Tokens are counted from the first rank on, all of which have as many as this one. The gradient passes to
    `logits` as if they had not been replaced.
    """
    num_experts = logits.shape[-1]
    num_tokens = logits.numel() // num_experts
    start = num_ranks_before * num_tokens * top_k % num_experts
    first = torch.arange(num_tokens, device=logits.device).unsqueeze(1) * top_k
    chosen = (start + first + torch.arange(top_k, device=logits.device)) % num_experts
    balanced: torch.Tensor = _ForcedLogits.apply(logits, chosen)
    return balanced


class _ForcedLogits(torch.autograd.Function):
    """Replaces logits forward so that `chosen` is, and passes their gradient on as if it had not."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        flat = torch.full_like(logits, OTHER_LOGIT).view(-1, logits.shape[-1])
        return flat.scatter_(1, chosen, CHOSEN_LOGIT).view_as(logits)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


class RecordedRouter(TopKRouter):  # type: ignore[misc]
    """Deals the tokens of a micro batch to experts in the proportions of a recorded layer.

    As with `RoundRobinRouter` the gate is computed and trained, and the logits are replaced on the way
    forward. Limits on the groups that a token may choose are lifted: the recording does not say which
    experts were chosen together.
    """

    def __init__(self, *args: Any, trace: Trace, config: Any, **kwargs: Any) -> None:
        unlimited = copy.copy(config)
        unlimited.moe_router_num_groups = unlimited.moe_router_group_topk = None
        super().__init__(*args, config=unlimited, **kwargs)
        self._trace = trace
        self._chosen: dict[int, torch.Tensor] = {}

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Logits [sequence, batch, experts] that make top-k choose as the recording says."""
        logits = super().gating(input)
        num_tokens = logits.numel() // self.num_experts
        if num_tokens not in self._chosen:
            counts = dealt_counts(self._recorded(), num_tokens=num_tokens, top_k=self.topk)
            self._chosen[num_tokens] = dealt_experts(counts, top_k=self.topk).to(logits.device)
        chosen: torch.Tensor = _ForcedLogits.apply(logits, self._chosen[num_tokens])
        return chosen

    def _recorded(self) -> tuple[int, ...]:
        """The recording of this layer, counted among those with experts, those of MTP last."""
        has_experts = self.config.moe_layer_freq
        index = self.layer_number - 1
        if isinstance(has_experts, list):
            index = sum(has_experts) + index if self.is_mtp_layer else sum(has_experts[:index])
        elif self.is_mtp_layer:
            index += self.config.num_layers
        return self._trace[index % len(self._trace)]


def dealt_experts(counts: Sequence[int], *, top_k: int) -> torch.Tensor:
    """Experts [token, k] of tokens that take in turn from experts with these counts.

    No token takes an expert twice: its choices stand T apart in the list of all, and no count exceeds T.
    """
    experts = torch.repeat_interleave(torch.tensor(counts))
    return experts.view(top_k, -1).T.contiguous()


def use_router(spec: Any, router: RouterBuilder) -> None:
    """Make every expert layer of a block or layer spec build `router`."""
    for moe in _moe_submodules(spec):
        moe.router = router


def _moe_submodules(spec: Any) -> Iterator[MoESubmodules]:
    """Search a tree of Megatron-Core module specs for the submodules of expert layers."""
    if isinstance(spec, MoESubmodules):
        yield spec
        return
    branches: Iterable[Any] = ()
    if isinstance(spec, functools.partial):
        branches = (*spec.args, *spec.keywords.values())
    elif isinstance(spec, list | tuple):
        branches = spec
    elif is_dataclass(spec) and not isinstance(spec, type):
        branches = vars(spec).values()
    for branch in branches:
        yield from _moe_submodules(branch)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLoad:
    """Token copies that each expert of one layer got, over all ranks."""

    layer: int
    """Counted from 0, among the decoder layers or among the multi-token prediction layers."""
    is_mtp: bool
    tokens_per_step: tuple[tuple[int, ...], ...]
    """For each step, warm-up included, one number per expert."""

    @property
    def name(self) -> str:
        """`decoder.<n>` or `mtp.<n>`."""
        return f"{'mtp' if self.is_mtp else 'decoder'}.{self.layer}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counted:
    """One router, and token copies that its experts got on this rank, int64."""

    router: TopKRouter
    by_step: torch.Tensor
    """[step, expert], of the steps that are over."""
    in_step: torch.Tensor
    """[expert], of the step that runs."""


class LoadCounter:
    """Counts the tokens that the routers of this rank send to each expert, on the device, step by step.

    A CUDA graph that holds a router adds to the address of its capture at every replay, so all steps are
    counted at one, and each step's count is moved to its own row when the step is over.
    """

    def __init__(
        self,
        chunks: Iterable[torch.nn.Module],
        *,
        num_steps: int,
        device: str,
        counts_padding: bool = True,
    ) -> None:
        """`counts_padding` says whether rows that fill up a capacity, with probability 0, are counted."""
        self._step = 0
        self._counts_padding = counts_padding
        self._watched: list[_Counted] = []
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    self._watch(module, num_steps, device)

    def start_step(self, step: int) -> None:
        """Count what follows for `step`, counted from 0 over warm-up and timed steps."""
        self._end_step()
        self._step = step

    def forget_step(self) -> None:
        """Count the step anew: what went through the routers since it began were no tokens of it."""
        for counted in self._watched:
            counted.in_step.zero_()

    def clear(self) -> None:
        """Forget what was counted."""
        self.forget_step()
        for counted in self._watched:
            counted.by_step.zero_()

    def loads(self) -> tuple[ExpertLoad, ...]:
        """Counts of this rank's layers, summed over the ranks that hold other tokens. A collective call."""
        self._end_step()
        loads = []
        for counted in self._watched:
            router, total = counted.router, counted.by_step.clone()
            distributed.all_reduce(total, group=router.tp_dp_cp_group)
            loads.append(
                ExpertLoad(
                    layer=router.layer_number - 1,
                    is_mtp=router.is_mtp_layer,
                    tokens_per_step=tuple(map(tuple, total.tolist())),
                )
            )
        return tuple(loads)

    def _end_step(self) -> None:
        for counted in self._watched:
            counted.by_step[self._step] += counted.in_step
        self.forget_step()

    def _watch(self, router: TopKRouter, num_steps: int, device: str) -> None:
        rows = torch.zeros(num_steps + 1, router.num_experts, dtype=torch.int64, device=device)
        counted = _Counted(router=router, by_step=rows[1:], in_step=rows[0])
        self._watched.append(counted)

        def count(module: TopKRouter, inputs: object, outputs: Sequence[torch.Tensor]) -> None:
            # A recomputed layer runs twice, the first time without gradients; before the capture of a layer
            # Megatron-Core runs it on no tokens of the step.
            if torch.is_grad_enabled() and not is_graph_warmup():
                taken = outputs[1] if self._counts_padding else outputs[1] & (outputs[0] > 0)
                counted.in_step.add_(taken.sum(dim=0))

        router.register_forward_hook(count)
