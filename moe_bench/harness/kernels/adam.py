"""Adam with moments stored in BF16, for Megatron-Core's distributed optimizer without Transformer Engine.

Megatron-Core's precision-aware optimizer leaves the FP32 weights and the moments to Transformer Engine's
FusedAdam: it hands over slices of the BF16 parameters with their gradients in `decoupled_grad`, and asks for
the state by `initialize_state`, `get_unscaled_state` and `set_scaled_state`. `StoredBf16Adam` keeps that
contract. Per parameter it stores 4 bytes of weight and 2 + 2 bytes of moments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.kernels.compiled import compiled

CHUNK_ELEMENTS = 2**24
"""Elements updated at a time: bounds the FP32 copies of the moments to 64 MiB each."""


class StoredBf16Adam(torch.optim.AdamW):
    """AdamW (arXiv:1711.05101) in FP32 arithmetic over moments stored in FP32 or BF16.

    m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g^2;
    w = w * (1 - lr * weight_decay) - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    The update reads the moments before they are rounded. State per parameter: `step`, `exp_avg`, `exp_avg_sq`
    and `master_param`, the FP32 weight, which is the parameter itself where that is FP32.
    """

    def __init__(
        self, params: Any, *, exp_avg_dtype: torch.dtype, exp_avg_sq_dtype: torch.dtype, **options: Any
    ) -> None:
        super().__init__(params, **options)
        for name, dtype in (("exp_avg_dtype", exp_avg_dtype), ("exp_avg_sq_dtype", exp_avg_sq_dtype)):
            if dtype not in (torch.float32, torch.bfloat16):
                raise MissingRequirementError(
                    f"optimizer.{name}: {dtype} needs Transformer Engine's FusedAdam, which scales it; "
                    "use fp32 or bf16"
                )
        self.exp_avg_dtype = exp_avg_dtype
        self.exp_avg_sq_dtype = exp_avg_sq_dtype

    def initialize_state(self, param: Tensor) -> None:
        """Give a parameter zero moments and its FP32 weight."""
        self.state[param] = {
            "step": torch.zeros((), device="cpu"),
            "exp_avg": torch.zeros_like(param, dtype=self.exp_avg_dtype),
            "exp_avg_sq": torch.zeros_like(param, dtype=self.exp_avg_sq_dtype),
            "master_param": param.detach().float(),
        }

    def get_unscaled_state(self, param: Tensor, name: str) -> Tensor:
        """Return one tensor of the state in FP32, as checkpoints hold it."""
        return self.state[param][name].float()

    def set_scaled_state(self, param: Tensor, name: str, value: Tensor) -> None:
        """Set one tensor of the state from FP32."""
        if len(self.state[param]) == 0:
            self.initialize_state(param)
        self.state[param][name].copy_(value)

    def step(self, closure: Any = None) -> None:
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise MissingRequirementError("StoredBf16Adam takes no closure; compute the loss before the step")
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    if getattr(param, "decoupled_grad", None) is not None:
                        self._update(param, group)

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        if len(self.state[param]) == 0:
            self.initialize_state(param)
        state = self.state[param]
        state["step"] += 1
        num_steps = int(state["step"])
        beta1, beta2 = group["betas"]
        # Tensors, filled on the device: numbers would be compiled in anew each step, copies waited for.
        scalars = [
            torch.full((), value, device=param.device)
            for value in (
                float(group["lr"]),
                float(group["lr"]) / (1 - beta1**num_steps),
                (1 - beta2**num_steps) ** 0.5,
            )
        ]
        update: Callable[..., None] = compiled(adam_update) if param.is_cuda else adam_update
        tensors = (param, param.decoupled_grad, state["master_param"], state["exp_avg"], state["exp_avg_sq"])
        for chunk in zip(*(tensor.view(-1).split(CHUNK_ELEMENTS) for tensor in tensors), strict=True):
            update(*chunk, *scalars, beta1, beta2, group["eps"], group["weight_decay"])


def adam_update(  # noqa: PLR0913  the arguments of Adam.
    param: Tensor,
    grad: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: Tensor,
    corrected_lr: Tensor,
    correction: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step of Adam in place, over tensors of one shape.

    Args:
        lr: the learning rate.
        corrected_lr: lr / (1 - beta1^t).
        correction: sqrt(1 - beta2^t).
    """
    grad = grad.float()
    first = exp_avg.float() * beta1 + grad * (1 - beta1)
    second = exp_avg_sq.float() * beta2 + grad * grad * (1 - beta2)
    updated = master * (1 - lr * weight_decay) - corrected_lr * first / (second.sqrt() / correction + eps)
    exp_avg.copy_(first)
    exp_avg_sq.copy_(second)
    master.copy_(updated)
    param.copy_(updated)


def low_precision_adam(
    config: OptimizerConfig,
    model_chunks: list[Any],
    *,
    exp_avg_dtype: torch.dtype,
    exp_avg_sq_dtype: torch.dtype,
    **options: Any,
) -> MegatronOptimizer:
    """Build Megatron-Core's optimizer with its state in these types, without Transformer Engine.

    The configuration comes in as that of a plain FP32 optimizer, for `OptimizerConfig` itself refuses the
    other one where FusedAdam is missing (optimizer_config.py:450). The flag that it derives from the request,
    and that makes the distributed optimizer leave FP32 weights to the inner optimizer, is set here; the inner
    optimizers that Megatron-Core builds are then exchanged for ours, group by group.

    Args:
        config: Adam with decoupled weight decay under the distributed optimizer, all state in FP32.
        model_chunks: the DistributedDataParallel chunks of this rank.
        options: further arguments of `get_megatron_optimizer`.

    Raises:
        MissingRequirementError: not that kind of optimizer.
    """
    _refuse_what_is_not_here(config, model_chunks)
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    config.exp_avg_dtype, config.exp_avg_sq_dtype = exp_avg_dtype, exp_avg_sq_dtype
    config.store_param_remainders = False
    optimizer = get_megatron_optimizer(config, model_chunks, **options)
    config.use_precision_aware_optimizer = True
    chained = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    for distributed in chained:
        if isinstance(distributed, DistributedOptimizer) and not distributed.is_stub_optimizer:
            distributed.optimizer = _replacement(distributed.optimizer, exp_avg_dtype, exp_avg_sq_dtype)
    return optimizer


def _replacement(
    optimizer: torch.optim.Optimizer, exp_avg_dtype: torch.dtype, exp_avg_sq_dtype: torch.dtype
) -> StoredBf16Adam:
    """Our Adam over the same groups, set as distrib_optimizer.py sets them: torch would refuse slices."""
    ours = StoredBf16Adam([torch.empty(0)], exp_avg_dtype=exp_avg_dtype, exp_avg_sq_dtype=exp_avg_sq_dtype)
    ours.param_groups = optimizer.param_groups
    return ours


def _refuse_what_is_not_here(config: OptimizerConfig, model_chunks: list[Any]) -> None:
    problems = (
        (config.optimizer != "adam", f"optimizer {config.optimizer}"),
        (not config.use_distributed_optimizer, "no distributed optimizer"),
        (not config.decoupled_weight_decay, "weight decay inside the gradient"),
        (config.optimizer_cpu_offload, "optimizer offload"),
        (config.main_params_dtype != torch.float32, f"main_params_dtype {config.main_params_dtype}"),
        (config.optimizer_cuda_graph, "optimizer_cuda_graph"),
        (model_chunks[0].ddp_config.use_megatron_fsdp, "Megatron-FSDP"),
    )
    for is_problem, what in problems:
        if is_problem:
            raise MissingRequirementError(
                f"optimizer moments in low precision with {what}: needs Transformer Engine's FusedAdam; "
                "install it, or keep the moments in fp32"
            )
