"""Tells the phases of a step apart where Megatron-Core does not: pipeline transfers, reductions, gathers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

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

    methods = (
        (P2PCommunicator, "_communicate", Phase.PIPELINE),
        (_ParamAndGradBucketGroup, "start_grad_sync", Phase.GRADIENT_SYNC),
        (_ParamAndGradBucketGroup, "finish_grad_sync", Phase.GRADIENT_SYNC),
        (_ParamAndGradBucketGroup, "start_param_sync", Phase.PARAMETER_SYNC),
        (_ParamAndGradBucketGroup, "finish_param_sync", Phase.PARAMETER_SYNC),
        (built.config, "finalize_model_grads_func", Phase.FINALIZE),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, phase in methods:
            replacement = during(phase, getattr(owner, name))
            stack.enter_context(substituted(Substitution(owner, name, replacement)))
        stack.enter_context(substituted(Substitution(built.optimizer, "step", last_step)))
        yield
