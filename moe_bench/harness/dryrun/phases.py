"""Tells the phases of a step apart where Megatron-Core does not: transfers, reductions, recomputation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp import MegatronFSDP
from megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer import (
    AllGatherPipeline,
    GradReducePipeline,
)
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from megatron.core.models.common import fine_grained_callables
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.tensor_parallel.random import CheckpointFunction, CheckpointWithoutOutput

from moe_bench.harness.build import Training
from moe_bench.harness.dryrun.places import Phase, Places
from moe_bench.harness.substitution import Substitution, substituted


@contextlib.contextmanager
def phases(places: Places, built: Training) -> Iterator[None]:
    """Keep `places.phase` right through a step of `built`, until the block ends."""

    def during(phase: Phase, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with places.during(phase):
                return function(*args, **kwargs)

        return call

    step = built.optimizer.step

    def last_step() -> Any:
        # What follows in a step, the mean of the loss over the job, comes once per step as well.
        places.phase = Phase.OPTIMIZER
        return step()

    def again(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with places.recomputing():
                return function(*args, **kwargs)

        return call

    build = fine_grained_callables.build_layer_callables

    def build_named(layer: torch.nn.Module) -> tuple[tuple[Any, ...], Any]:
        # Parts of a layer that are called apart, so that two micro batches can take turns.
        parts, gradients = build(layer)
        name = places.name_of(layer)
        return tuple(part and _inside(places, name, part) for part in parts), gradients

    others = (
        Substitution(fine_grained_callables, "build_layer_callables", build_named),
        Substitution(built.optimizer, "step", last_step),
        Substitution(CheckpointFunction, "backward", staticmethod(again(CheckpointFunction.backward))),
        Substitution(CheckpointWithoutOutput, "_recompute", again(CheckpointWithoutOutput._recompute)),
    )
    methods = (
        (P2PCommunicator, "_communicate", Phase.PIPELINE),
        (_ParamAndGradBucketGroup, "start_grad_sync", Phase.GRADIENT_SYNC),
        (_ParamAndGradBucketGroup, "finish_grad_sync", Phase.GRADIENT_SYNC),
        (_ParamAndGradBucketGroup, "start_param_sync", Phase.PARAMETER_SYNC),
        (_ParamAndGradBucketGroup, "finish_param_sync", Phase.PARAMETER_SYNC),
        (MegatronFSDP, "start_grad_sync", Phase.GRADIENT_SYNC),
        (GradReducePipeline, "reduce_gradients", Phase.GRADIENT_SYNC),
        (MegatronFSDP, "start_param_sync", Phase.PARAMETER_SYNC),
        (AllGatherPipeline, "all_gather_params", Phase.PARAMETER_SYNC),
        (built.config, "finalize_model_grads_func", Phase.FINALIZE),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, phase in methods:
            replacement = during(phase, getattr(owner, name))
            stack.enter_context(substituted(Substitution(owner, name, replacement)))
        for substitution in others:
            stack.enter_context(substituted(substitution))
        yield


def _inside(places: Places, name: str, part: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with places.inside(name):
            return part(*args, **kwargs)

    return call
