"""The learning rate step by step, by Megatron-Core's own scheduler; experts may have a rate of their own."""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer import OptimizerConfig, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import (
    OptimizerParamScheduler,
    ParamGroupOverride,
    get_canonical_lr_for_logging,
)

from moe_bench.spec.training import LearningRate

EXPERT_WEIGHTS = "*.experts.*"
"""Names of the routed experts' parameters in Megatron-Core's models; `shared_experts` are none of them."""


def expert_overrides(maximum: float, rates: LearningRate) -> dict[ParamKey, ParamGroupOverride] | None:
    """What `get_megatron_optimizer` is told of the experts, beside what it does by default.

    `maximum` is the learning rate of all other weights. None where experts learn like these.
    """
    if rates.expert_factor == 1.0:
        return None
    own = maximum * rates.expert_factor
    experts = ParamGroupOverride(max_lr=own, min_lr=own * rates.minimum_fraction)
    return {
        **get_standard_config_overrides(OptimizerConfig(lr=maximum)),
        ParamKey(name=EXPERT_WEIGHTS): experts,
    }


def scheduler(optimizer: Any, rates: LearningRate) -> OptimizerParamScheduler:
    """The scheduler of `optimizer`, which counts steps.

    At step s of the warm-up of W steps the rate is max * s / W; at step s after it, of D steps of decay,
    min + (max - min) * (1 + cos(pi * (s - W) / (D - W))) / 2; then min.
    """
    maximum, weight_decay = optimizer.config.lr, optimizer.config.weight_decay
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=maximum,
        min_lr=maximum * rates.minimum_fraction,
        lr_warmup_steps=rates.num_warmup_steps,
        lr_decay_steps=rates.num_decay_steps,
        lr_decay_style="cosine",
        start_wd=weight_decay,
        end_wd=weight_decay,
        wd_incr_steps=rates.num_decay_steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def learning_rate_now(optimizer: Any) -> float:
    """The rate that the next step takes, of all weights but those with one of their own."""
    rate = get_canonical_lr_for_logging(optimizer.param_groups)
    return 0.0 if rate is None else float(rate)
