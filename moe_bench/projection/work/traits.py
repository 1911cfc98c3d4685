"""What training engines other than Megatron-Core do differently, as far as it changes the time of a layer."""

from __future__ import annotations

from dataclasses import dataclass

from moe_bench.projection.work.operations import Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """How an engine runs a layer."""

    stops_recompute_early: bool = False
    """Whether recomputation ends where the last saved tensor is back, as torch.utils.checkpoint does, or runs
    the whole module (Megatron-Core, tensor_parallel/random.py)."""
    keeps_gathered_weights: bool = False
    """Whether weights that are gathered stay whole until the end of the step where there is a pipeline
    (torchtitan's `fsdp_reshard_after_forward`)."""
    attention_fraction: float = 1.0
    """Rate of its attention kernels over that of the best public ones (cuDNN, FlashAttention 3)."""
    experts_fraction: float = 1.0
    """Rate of its experts' products over that of Transformer Engine's."""
    num_flushes: int = 1
    """Pipeline schedules of one step, one behind the other: torch's pipelines empty themselves after every
    local batch, Megatron-Core's once."""
    fuses_expert_biases: bool = False
    """Whether experts add their biases inside of their products, not as sums of their own."""
    fuses_attention: bool = True
    """Whether scores stay inside of one kernel, or are written, normalised and read as a matrix."""
    bf16_parts: frozenset[Part] = frozenset()
    """Parts whose products stay in BF16 in layers that are quantized."""
    quantizes_mtp: bool = True
    """Whether prediction modules are quantized where the layers are."""
    is_bound_to_first_cpu: bool = False
    """Whether all processes of a node run on its first CPU and its memory, wherever their GPU is joined."""


MEGATRON = Traits()
AUTOMODEL = Traits(stops_recompute_early=True)
TORCHTITAN = Traits(stops_recompute_early=True, keeps_gathered_weights=True, attention_fraction=0.5)
"""torch's scaled_dot_product_attention was FlashAttention 2, which reaches 35 % of an H100's peak where
FlashAttention 3 reaches up to 75 % (arXiv:2407.08608, abstract)."""
