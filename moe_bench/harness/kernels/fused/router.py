"""Megatron-Core's top-k router on our routing kernels; losses, capacity and expert bias are its own."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.kernels.fused.class_of import with_methods_of
from moe_bench.harness.kernels.fused.routing import Choice, route, scores_for_losses
from moe_bench.harness.routers import CapacityRouter

_KNOWN = (TopKRouter.routing, CapacityRouter.routing)
"""Megatron-Core's, and what calls the class behind it."""


def fuse_router(router: TopKRouter) -> None:
    """Let a router, or one that forces its logits, choose with our kernels.

    Raises:
        MissingRequirementError: it chooses in a way that they do not know.
    """
    config = router.config
    problems = (
        (router.routing_type in ("sinkhorn", "quantile_balancing"), f"{router.routing_type}"),
        (config.moe_enable_routing_replay, "moe_enable_routing_replay"),
        (type(router).routing not in _KNOWN, f"{type(router).__name__}.routing"),
    )
    for is_problem, what in problems:
        if is_problem:
            raise MissingRequirementError(f"kernels.fusions.router: it does not know {what}; set it to false")
    router.__class__ = with_methods_of(type(router), FusedTopKRouter)


class FusedTopKRouter(TopKRouter):  # type: ignore[misc]
    """`routing` written again: what Megatron-Core leaves to Transformer Engine is ours."""

    @property
    def _choice(self) -> Choice:
        config = self.config
        return Choice(
            top_k=self.topk,
            score=self.score_function,
            is_before=config.moe_router_pre_softmax,
            # As in topk_routing_with_score_function, groups count where some are chosen.
            num_groups=config.moe_router_num_groups if config.moe_router_group_topk else 1,
            groups_per_token=config.moe_router_group_topk or 1,
            scale=config.moe_router_topk_scaling_factor or 1.0,
        )

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Probabilities and map [tokens, experts] of logits [sequence, batch, experts]."""
        seq_length, num_sequences = logits.shape[:2]
        logits = logits.view(-1, self.config.num_moe_experts)
        if padding_mask is not None:
            padding_mask = padding_mask.reshape(-1)
        logits = self.apply_z_loss(logits, padding_mask=padding_mask)
        probs, routing_map = route(logits, self._choice, self.expert_bias)
        if self.config.moe_expert_capacity_factor is not None:
            probs, routing_map = apply_router_token_dropping(
                probs,
                routing_map,
                router_topk=self.topk,
                capacity_factor=self.config.moe_expert_capacity_factor,
                drop_policy=self.config.moe_token_drop_policy,
                pad_to_capacity=self.config.moe_pad_expert_input_to_capacity,
            )
        probs = self._with_losses(probs, logits, padding_mask, (seq_length, num_sequences))
        self._apply_expert_bias(routing_map, padding_mask=padding_mask)
        return probs, routing_map

    def _with_losses(
        self, probs: Tensor, logits: Tensor, padding_mask: Tensor | None, shape: tuple[int, int]
    ) -> Tensor:
        """Attach the balancing losses, whose scores are read off all experts."""
        if not (self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled()):
            return probs
        scores, chosen = scores_for_losses(logits, top_k=self.topk, score=self.score_function)
        is_masked = padding_mask is not None
        if padding_mask is not None:
            is_token = ~padding_mask.unsqueeze(-1)
            scores, chosen = scores * is_token, chosen * is_token
        probs = self._apply_aux_loss(probs, scores, chosen, with_padding_mask=is_masked)
        probs = self._apply_seq_aux_loss(probs, scores, chosen, *shape, with_padding_mask=is_masked)
        return self._apply_global_aux_loss(probs, scores, chosen, with_padding_mask=is_masked)
