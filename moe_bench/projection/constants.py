"""The constants of the projection: what separates a kernel alone from the same kernel in a training step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """The defaults of those that `FITTED` names are fitted to all published rows of Megatron-Core, and tested
    against a new fit; the others are assumed. Each can be measured on a node.
    """

    sustained_fraction: float = 0.910
    """Rate of matrix products in a long step over their burst rate: clocks under load, and what other kernels
    leave in the caches."""
    fp4_gain_factor: float = 1.52
    """Rate of NVFP4 products in training over that of the inference kernels that the tables timed."""
    memory_fraction: float = 0.390
    """Share of the datasheet's HBM bandwidth that memory-bound kernels of a layer reach; quantization has its
    own, measured beside the products (evidence/rates.py)."""
    nic_fraction: float = 0.874
    """Share of a NIC's rate that DeepEP's and HybridEP's dispatch and combine reach."""
    alltoall_nic_fraction: float = 0.75
    """The same of NCCL's all-to-all: 0.62 to 0.94 of 48.5 of 50 GB/s over 2 to 16 nodes by size
    (aliyun/SimAI, ata_ratio.csv)."""
    launch_s: float = 22.7e-6
    """Host time per kernel of a layer, with the framework's and autograd's share."""
    grace_launch_factor: float = 1.09
    """The same on a Grace host, relative to x86."""
    straggler_std: float = 0.0127
    """Spread of step times between ranks: a job waits for the slowest, (1 + s sqrt(2 ln n))."""
    sustained_attention_fraction: float = 0.92
    nvlink_fraction: float = 0.70
    """Of NCCL's collectives: 300 to 335 of 450 GB/s for large messages on an H100 node."""
    flex_nvlink_fraction: float = 0.80
    dp_nic_fraction: float = 0.85
    overlap_loss: float = 0.35
    """Computation lost per second of dispatch or combine beside it: 20 to 32 of 132 to 148 SMs run the
    transfer, and it shares the memory."""
    tensor_exposed_fraction: float = 0.5
    """Share of tensor-parallel traffic that Transformer Engine's user buffers leave exposed, with what
    products cut into pieces lose beside it. Chosen between 0.17 and 0.8 by rows left out of the fit."""
    stream_fraction: float = 0.7
    """Share of HBM bandwidth of large plain kernels: the optimizer."""
    host_exponent: float = 5.0
    """p of (GPU^p + host^p)^(1/p): near the maximum, with a loss where the two come close."""

    def with_values(self, names: tuple[str, ...], values: tuple[float, ...]) -> Self:
        """These constants with some replaced."""
        return replace(self, **dict(zip(names, values, strict=True)))

    def values(self, names: tuple[str, ...]) -> tuple[float, ...]:
        """The named ones."""
        return tuple(float(getattr(self, name)) for name in names)


FITTED = ("sustained_fraction", "fp4_gain_factor", "memory_fraction", "nic_fraction", "launch_s")
"""What is fitted to published rows; everything else is assumed, with its reason beside it."""
PRIOR = Constants(
    sustained_fraction=0.85, fp4_gain_factor=1.0, memory_fraction=0.45, nic_fraction=0.87, launch_s=22e-6
)
"""Where a fit starts, before it has seen a row: products held for 10 s and more run at 0.85 to 0.95 of their
burst rate; fused permutation reaches 0.50 of the memory's bandwidth and cross entropy 0.28 to 0.32 (B200,
MooreThreads/SimuMax 4dcaae5); DeepEP and HybridEP put 41 to 46 GB/s on a wire of 50 (their READMEs, by the
distinct nodes of a token). The launch is the exception: it was first read off host-bound rows."""
PRIOR_SPREAD = {
    "sustained_fraction": 0.05,
    "fp4_gain_factor": 0.3,
    "memory_fraction": 0.1,
    "nic_fraction": 0.05,
    "launch_s": 0.1,
}
"""Relative uncertainty of `PRIOR`."""
