"""Counts what each expert of the whole model gets over a few steps of training."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter

from moe_bench.harness.build import Training
from moe_bench.harness.routers import ExpertChoiceRouter
from moe_bench.harness.routing import LoadCounter
from moe_bench.results.training_health import HealthLine, LayerHealth
from moe_bench.spec.training import TrainingJob


class HealthCounter:
    """Adds up, on the device, the tokens of every expert of this rank's layers until somebody asks."""

    def __init__(self, job: TrainingJob, built: Training, *, device: str, num_steps: int) -> None:
        """`num_steps` have been taken before."""
        recipe = job.plan.recipe
        self._tokens_per_step = recipe.global_batch_size * recipe.seq_len
        self._last_step = num_steps
        self._counter = LoadCounter(built.chunks, num_steps=1, device=device, counts_padding=False)
        self._routers = {
            (module.is_mtp_layer, module.layer_number - 1): module
            for chunk in built.chunks
            for module in chunk.modules()
            if isinstance(module, TopKRouter)
        }

    def line(self, step: int) -> HealthLine:
        """The experts of all layers up to `step`, since the call before. A collective call of all ranks."""
        num_steps = step - self._last_step
        mine: dict[tuple[bool, int], LayerHealth] = {}
        for load in self._counter.loads():
            router = self._routers[load.is_mtp, load.layer]
            mine[load.is_mtp, load.layer] = LayerHealth(
                layer=load.name,
                top_k=router.topk,
                num_tokens=num_steps * self._tokens_per_step,
                tokens_per_expert=load.tokens_per_step[0],
                experts_choose=isinstance(router, ExpertChoiceRouter),
                expert_bias_range=_range(router.expert_bias),
            )
        self._counter.clear()
        self._last_step = step
        stages = [mine] * parallel_state.get_pipeline_model_parallel_world_size()
        if len(stages) > 1:
            torch.distributed.all_gather_object(
                stages, mine, group=parallel_state.get_pipeline_model_parallel_group()
            )
        layers = sorted(item for stage in stages for item in stage.items())
        return HealthLine(step=step, num_steps=num_steps, layers=tuple(layer for _, layer in layers))


def _range(bias: torch.Tensor | None) -> tuple[float, float] | None:
    return None if bias is None else (float(bias.min()), float(bias.max()))
