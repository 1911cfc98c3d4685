"""Routers that Megatron-Core lacks: expert choice, GShard's two experts, capacities by order or minimum."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import (
    get_tokens_per_expert_and_token_count,
    switch_load_balancing_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.draws import token_draws
from moe_bench.harness.routing import RecordedRouter, RoundRobinRouter, RouterBuilder
from moe_bench.harness.settings import Settings
from moe_bench.spec.recipe import TokenDrop


class ExpertChoiceRouter(TopKRouter):  # type: ignore[misc]
    """Every expert takes the C = T k c / E tokens of a rank's micro batch that score highest with it.

    S = softmax(X W) over the experts, G, I = top-C(S^T), and expert e weighs token I[e, j] by G[e, j]
    (arXiv:2202.09368, section 3.2). A token goes to as many experts as take it, or to none; the router sees
    the tokens behind it.
    """

    def __init__(self, *args: Any, drop: TokenDrop, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._drop = drop

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Probabilities and map [tokens, experts] of logits [sequence, batch, experts]."""
        if padding_mask is not None:
            raise MissingRequirementError("expert_choice does not know padded tokens; use batches without")
        logits = self.apply_z_loss(logits.view(-1, self.num_experts))
        scores = torch.softmax(logits, dim=-1, dtype=torch.float32).type_as(logits)
        capacity = _capacity(self, self._drop, num_tokens=len(scores))
        taken = scores.topk(capacity, dim=0, sorted=False).indices
        routing_map = torch.zeros_like(scores, dtype=torch.bool).scatter(0, taken, True)
        return scores * routing_map, routing_map


class CapacityRouter(TopKRouter):  # type: ignore[misc]
    """Megatron-Core's choice, and then a capacity that it does not know.

    Its own has one factor for training and evaluation, no minimum, and `position` takes any of the tokens
    that chose an expert: `torch.topk` over zeros and ones promises no order (moe_utils.py,
    apply_router_token_dropping). Here the first of the sequence stay, those of several sequences in turn.
    Loads and expert biases count what tokens chose, before any is dropped.
    """

    def __init__(self, *args: Any, config: TransformerConfig, drop: TokenDrop, **kwargs: Any) -> None:
        super().__init__(*args, config=_unlimited(config), **kwargs)
        self._drop = drop

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Probabilities and map [tokens, experts] of logits [sequence, batch, experts]."""
        probs, chosen = super().routing(logits, padding_mask=padding_mask)
        capacity = _capacity(self, self._drop, num_tokens=len(probs))
        return within_capacity(probs, chosen, capacity=capacity, drop=self._drop)


class GShardRouter(TopKRouter):  # type: ignore[misc]
    """A token's best expert, and its second best by chance (arXiv:2006.16668, algorithm 1).

    With the weights of both normalised to g1 + g2 = 1, the second is sent to with probability 2 g2 while the
    model trains, and always in evaluation. First choices fill an expert's capacity before second ones, each
    in the order of tokens, and the balancing loss counts first choices alone. A second expert that the draw
    leaves out takes no place, as in the authors' code (tensorflow/lingvo, core/gshard_layers.py,
    Top2GatingOnLogits); in the paper's listing it does.

    A token's draw depends on the seed, the token and the layer alone (`draws`): recomputed, in a run that was
    resumed and in another layout its choice is the same.
    """

    def __init__(
        self, *args: Any, config: TransformerConfig, drop: TokenDrop, seed: int, **kwargs: Any
    ) -> None:
        super().__init__(*args, config=_unlimited(config), **kwargs)
        self._drop, self._seed = drop, seed

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Probabilities and map [tokens, experts] of logits [sequence, batch, experts]."""
        if padding_mask is not None:
            raise MissingRequirementError("gshard does not know padded tokens; use batches without")
        seq_len, num_sequences, _ = logits.shape
        probs, chosen = super().routing(logits)
        first = torch.zeros_like(chosen).scatter(1, probs.argmax(dim=1, keepdim=True), True)
        second = chosen & ~first
        if self.training:
            weights = (probs * second).sum(dim=1)
            draws = token_draws(
                self, self._seed, seq_len=seq_len, num_sequences=num_sequences, device=weights.device
            )
            second = second & (2 * weights > draws.flatten()).unsqueeze(1)
        chosen = first | second
        capacity = _capacity(self, self._drop, num_tokens=len(probs))
        return within_capacity(
            probs * chosen, chosen, capacity=capacity, drop=self._drop, rank=first.byte() + chosen
        )

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, **options: Any
    ) -> Tensor:
        """l_aux = E sum_e (c_e / T) m_e, c_e tokens whose first choice is e, m_e its mean probability.

        The paper's 1 / E in the place of E is a constant that the coefficient takes up, as in its code.
        """
        del routing_map, options
        scores, coefficient = scores_for_aux_loss, self.get_aux_loss_coeff("aux_loss")
        if coefficient == 0:
            return probs
        first = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.argmax(1, keepdim=True), True)
        group = self.tp_cp_group
        per_expert, num_tokens, total = get_tokens_per_expert_and_token_count(
            routing_map=first, reduce_group=group, topk=1
        )
        loss = switch_load_balancing_loss_func(
            probs=scores,
            tokens_per_expert=per_expert,
            total_num_tokens=total,
            topk=1,
            num_experts=self.num_experts,
            moe_aux_loss_coeff=coefficient,
        )
        attached: Tensor = self.attach_and_log_load_balancing_loss(
            probs, coefficient, loss, "load_balancing_loss", group, valid_token_count=num_tokens
        )
        return attached


class UnbiasedRouter(TopKRouter):  # type: ignore[misc]
    """Megatron-Core's, without the bias that it takes from `add_bias_linear`."""

    def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        plain = copy.copy(config)
        plain.add_bias_linear = False
        super().__init__(*args, config=plain, **kwargs)


def within_capacity(
    probs: Tensor, chosen: Tensor, *, capacity: int, drop: TokenDrop, rank: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Probabilities and map [tokens, experts] of which every expert keeps at most `capacity` tokens.

    By position the first tokens stay that chose it; those of the highest `rank`, where it is given, before
    all others. Padded, it keeps exactly as many: tokens that did not choose it fill up, with probability 0.
    """
    if capacity >= len(probs):
        return probs, chosen
    if drop.policy == "probs":
        stay = probs.topk(capacity, dim=0, sorted=False).indices
    else:
        order = chosen if rank is None else rank
        stay = order.sort(dim=0, descending=True, stable=True).indices[:capacity]
    kept = torch.zeros_like(chosen).scatter(0, stay, True)
    if not drop.pad_to_capacity:
        kept = kept & chosen
    return probs * kept, kept


LIMITING = (CapacityRouter, ExpertChoiceRouter, GShardRouter)
"""Routers that work out capacities themselves."""


def chosen_router(settings: Settings, config: TransformerConfig) -> RouterBuilder | None:
    """What builds the routers of a recipe; None leaves it to Megatron-Core."""
    kinds: list[type[TopKRouter]] = []
    options: dict[str, Any] = {}
    if config.add_bias_linear and not settings.router_has_bias:
        kinds.append(UnbiasedRouter)
    if settings.routing_mode == "recorded":
        kinds.append(RecordedRouter)
        options["trace"] = settings.routing_trace
    elif settings.routing_mode == "round_robin":
        kinds.append(RoundRobinRouter)
    drop = _token_drop(settings, config)
    if drop is not None and settings.router_choice == "gshard":
        kinds.append(GShardRouter)
        options |= {"drop": drop, "seed": settings.seed}
    elif drop is not None and (settings.router_choice == "expert_choice" or drop.is_ours):
        kinds.append(ExpertChoiceRouter if settings.router_choice == "expert_choice" else CapacityRouter)
        options["drop"] = drop
    if not kinds:
        return None
    kind = kinds[0] if len(kinds) == 1 else type("".join(one.__name__ for one in kinds), tuple(kinds), {})
    return functools.partial(kind, **options) if options else kind


def tell_dispatchers(modules: Iterable[torch.nn.Module]) -> None:
    """Let every router that limits its experts itself tell its layer's dispatcher the capacity."""
    for module in modules:
        if isinstance(module, MoELayer) and isinstance(module.router, LIMITING):
            module.router.dispatcher = module.token_dispatcher


def _unlimited(config: TransformerConfig) -> TransformerConfig:
    """The configuration without Megatron-Core's own capacity."""
    unlimited = copy.copy(config)
    unlimited.moe_expert_capacity_factor = None
    return unlimited


def _token_drop(settings: Settings, config: TransformerConfig) -> TokenDrop | None:
    if config.moe_expert_capacity_factor is None:
        return None
    return TokenDrop(
        capacity_factor=config.moe_expert_capacity_factor,
        eval_capacity_factor=settings.eval_capacity_factor,
        min_capacity=settings.min_capacity,
        pad_to_capacity=config.moe_pad_expert_input_to_capacity,
        policy=config.moe_token_drop_policy,
    )


def _capacity(router: Any, drop: TokenDrop, *, num_tokens: int) -> int:
    """The capacity of this call, which the dispatcher of the layer is told as the factor that leads to it.

    Dispatchers work it out again, by ceil(T k / E c): half a token less is not rounded to another number.
    """
    num_choices = num_tokens * router.topk
    capacity = drop.capacity(
        num_choices=num_choices, num_experts=router.num_experts, is_training=router.training
    )
    dispatcher = getattr(router, "dispatcher", None)
    if dispatcher is not None:
        factor = (capacity - 0.5) * router.num_experts / num_choices
        dispatcher.moe_expert_capacity_factor = factor
        if hasattr(dispatcher, "_comm_manager"):
            dispatcher._comm_manager.capacity_factor = factor
    return min(capacity, num_tokens)
