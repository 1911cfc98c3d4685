"""How the GPUs of a job divide the model: Megatron-Core's process group sizes and the sizes that follow."""

from __future__ import annotations

from typing import Literal

from moe_bench.spec.base import NonNegativeInt, PositiveInt, Spec, Text


class ParallelSpec(Spec):
    """Process group sizes. Data parallelism is what remains; it is derived, never stated."""

    num_gpus: PositiveInt
    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    virtual_pipeline: PositiveInt = 1
    """Model chunks per pipeline rank; with a layout string it is read off the string and must agree."""
    layout: Text | None = None
    """Megatron-Core's pipeline layout string, such as `Et|(tt|)*30L`; null splits the layers evenly."""
    embedding_counts_as_layer: bool = False
    loss_counts_as_layer: bool = False
    num_layers_first_stage: NonNegativeInt = 0
    """Decoder layers of the first pipeline rank; 0 leaves it to the even split."""
    num_layers_last_stage: NonNegativeInt = 0
    micro_batch_group_size: NonNegativeInt = 0
    """Micro batches per group of the interleaved schedule; 0 takes the pipeline size."""
    context: PositiveInt = 1
    context_comm: Literal["p2p", "a2a", "allgather"] = "p2p"
    expert: PositiveInt = 1
    expert_tensor: PositiveInt = 1
    sequence_parallel: bool = False
    data_sharding: Literal["none", "distributed_optimizer", "megatron_fsdp"] = "distributed_optimizer"
    fsdp_strategy: Literal["optim", "optim_grads", "optim_grads_params"] = "optim_grads_params"
    """What Megatron-FSDP shards; read only with `data_sharding: megatron_fsdp`."""
    num_optimizer_instances: PositiveInt = 1
    """Groups that each hold a full sharded optimizer (hybrid sharding)."""

    @property
    def model_parallel(self) -> int:
        """Ranks that together hold one replica of the dense weights."""
        return self.tensor * self.pipeline * self.context

    @property
    def data(self) -> int:
        """Replicas that each read their own batch (context ranks share one)."""
        return self.num_gpus // self.model_parallel

    @property
    def dense_shards(self) -> int:
        """Ranks over which a dense weight's optimizer state is divided: data x context."""
        return self.data * self.context

    @property
    def expert_data(self) -> int:
        """Replicas of each expert weight."""
        return self.num_gpus // (self.expert * self.expert_tensor * self.pipeline)

    @property
    def num_chunks(self) -> int:
        """Model chunks over the whole pipeline."""
        return self.pipeline * self.virtual_pipeline
