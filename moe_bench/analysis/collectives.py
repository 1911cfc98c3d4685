"""The vocabulary of communication: collectives, process groups, and what one of them carries.

Bytes are those that NCCL's calls are given: of the output for an all-gather, of the input for a
reduce-scatter and an all-to-all (a rank's own share included), of the tensor for everything else.
`harness/loopback.py` counts in the same way, so the two can be compared line by line.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.recipe import RecomputeModule


class Collective(StrEnum):
    """A collective, or one direction of a message."""

    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_REDUCE = "all_reduce"
    ALL_TO_ALL = "all_to_all"
    SEND = "send"
    RECV = "recv"
    NVLINK = "nvlink"
    """What the kernels of DeepEP and HybridEP move inside an NVLink domain."""
    RDMA = "rdma"
    """What they send to other domains."""


class Group(StrEnum):
    """A process group of Megatron-Core in the field's short form."""

    TENSOR = "TP"
    CONTEXT = "CP"
    PIPELINE = "PP"
    EXPERT = "EP"
    EXPERT_TENSOR = "ETP"
    EXPERT_TENSOR_EXPERT = "ETPxEP"
    TENSOR_CONTEXT = "TPxCP"
    TENSOR_DATA_CONTEXT = "TPxDPxCP"
    DATA_CONTEXT = "DPxCP"
    EXPERT_DATA = "EDP"
    INSTANCES = "optimizer instances"
    """The same shard in all instances of the distributed optimizer."""
    EMBEDDING = "embedding"


class Phase(StrEnum):
    """When in the step a call is made."""

    FORWARD = "forward"
    RECOMPUTE = "recompute"
    BACKWARD = "backward"
    PIPELINE = "pipeline"
    GRADIENT_SYNC = "gradient sync"
    PARAMETER_SYNC = "parameter sync"
    FINALIZE = "finalize"
    """Between the last backward pass and the optimizer."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of one collective on one rank."""

    op: Collective
    group: Group
    num_bytes: int
    what: str
    """What it carries, in a few words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """The calls that one part of a layer makes per micro batch, forward and backward."""

    forward: tuple[Call, ...] = ()
    backward: tuple[Call, ...] = ()
    repeated_by: frozenset[RecomputeModule] = frozenset()
    """Recompute modules that contain this part and so make the forward calls again."""
    needs_grad: bool = False
    """Whether the forward calls are made only where autograd records: a part that is recomputed then makes
    them once, in the second pass."""


def group_size(parallel: ParallelSpec, group: Group) -> int:
    """Ranks of a group. Raises KeyError for the embedding group, whose ranks depend on the pipeline."""
    tensor, context, data = parallel.tensor, parallel.context, parallel.data
    instances = parallel.num_optimizer_instances
    return {
        Group.TENSOR: tensor,
        Group.CONTEXT: context,
        Group.PIPELINE: parallel.pipeline,
        Group.EXPERT: parallel.expert,
        Group.EXPERT_TENSOR: parallel.expert_tensor,
        Group.EXPERT_TENSOR_EXPERT: parallel.expert_tensor * parallel.expert,
        Group.TENSOR_CONTEXT: tensor * context,
        Group.TENSOR_DATA_CONTEXT: tensor * data * context,
        Group.DATA_CONTEXT: max(1, parallel.dense_shards // instances),
        Group.EXPERT_DATA: max(1, parallel.expert_data // instances),
        Group.INSTANCES: instances,
    }[group]


def sent_bytes(op: Collective, num_bytes: int, size: int) -> int:
    """Bytes of `num_bytes` that leave the rank, in a group of `size`, balanced.

    (n - 1) / n for an all-gather, a reduce-scatter and an all-to-all, twice that for an all-reduce (ring:
    NVIDIA/nccl-tests, doc/PERFORMANCE.md), all of a message sent, nothing of one received.
    """
    if op in (Collective.SEND, Collective.NVLINK, Collective.RDMA):
        return num_bytes
    if op is Collective.RECV:
        return 0
    return (1 + (op is Collective.ALL_REDUCE)) * num_bytes * (size - 1) // size
