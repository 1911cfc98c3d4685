"""CUDA graphs inside a training step, captured where Megatron-LM's training loop captures them.

`local` layers are captured by the schedule at the end of the first step. Those of Transformer Engine are
captured between two steps, and the whole iteration within one, both after `cuda_graph_warmup_steps` steps.
The optimizer's step is never part of a graph. It has not run on a GPU yet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import full_cuda_graph, num_microbatches_calculator
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import cuda_graphs

from moe_bench.harness.batches import BatchPlan
from moe_bench.harness.build import Training
from moe_bench.harness.step import Schedule


class StepGraphs:
    """No graphs, or those that the schedule captures by itself."""

    schedule: Schedule | None = None
    """What runs the forward and backward passes; None is Megatron-Core's own schedule."""

    def capture_before(self, step: int) -> bool:
        """Capture what is due before `step`, counted from 0; whether anything was.

        A capture runs layers on made-up tokens, and leaves gradients and the counts of routers zeroed, not
        what else listens to the layers.
        """
        return False


class _EngineGraphs(StepGraphs):
    """Transformer Engine's graphs, one per layer and micro batch in flight."""

    def __init__(self, built: Training, plan: BatchPlan) -> None:
        self._chunks: tuple[Any, ...] = built.chunks
        self._first_step = built.config.cuda_graph_warmup_steps
        self.helper = cuda_graphs.TECudaGraphHelper(
            model=list(built.chunks),
            config=built.config,
            seq_length=plan.seq_len,
            micro_batch_size=plan.micro_batch_size,
            optimizers=[built.optimizer],
        )

    def capture_before(self, step: int) -> bool:
        """As Megatron-LM: hooks that gather weights under the forward pass are off during the capture, and
        called by hand before each replay.
        """
        if step != self._first_step or self.helper.capture_finished():
            return False
        hooked = [chunk for chunk in self._chunks if chunk.ddp_config.overlap_param_gather]
        for chunk in hooked:
            chunk.disable_forward_pre_hook(param_sync=False)
        self.helper.create_cudagraphs()
        for chunk in hooked:
            chunk.enable_forward_pre_hook()
        if hooked:
            self.helper.cuda_graph_set_manual_hooks()
        return True


class _IterationGraph(StepGraphs):
    """All forward and backward passes of a step with their reductions, as one graph."""

    def __init__(self, built: Training) -> None:
        self.wrapper = full_cuda_graph.FullCudaGraphWrapper(
            get_forward_backward_func(),
            cuda_graph_warmup_steps=built.config.cuda_graph_warmup_steps,
            use_single_mempool=built.config.cuda_graph_use_single_mempool,
        )
        self.schedule = self.wrapper


@contextlib.contextmanager
def step_graphs(built: Training, plan: BatchPlan) -> Iterator[StepGraphs]:
    """The graphs that the config of `built` asks for, deleted when the block ends."""
    match built.config.cuda_graph_impl:
        case "none":
            yield StepGraphs()
        case "local":
            try:
                yield StepGraphs()
            finally:
                cuda_graphs.delete_cuda_graphs()
        case "transformer_engine":
            with _counted_micro_batches(plan):
                graphs = _EngineGraphs(built, plan)
                try:
                    yield graphs
                finally:
                    if graphs.helper.graphs_created():
                        graphs.helper.delete_cuda_graphs()
        case "full_iteration":
            whole = _IterationGraph(built)
            try:
                yield whole
            finally:
                whole.wrapper.reset_cuda_graph()
                for buffers in full_cuda_graph.StaticBufferLoader.static_buffers.values():
                    buffers.clear()


@contextlib.contextmanager
def _counted_micro_batches(plan: BatchPlan) -> Iterator[None]:
    """Megatron-Core's count of micro batches per step, which the capture asks for."""
    num_microbatches_calculator.init_num_microbatches_calculator(
        rank=torch.distributed.get_rank(),
        global_batch_size=plan.num_micro_batches * plan.data_size * plan.micro_batch_size,
        micro_batch_size=plan.micro_batch_size,
        data_parallel_size=plan.data_size,
    )
    try:
        yield
    finally:
        num_microbatches_calculator.unset_num_microbatches_calculator()
