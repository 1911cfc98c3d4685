"""How each publisher of TFLOPs/GPU counts floating-point operations; two counts may differ by a third."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from moe_bench.analysis.flops import FlopsCounting

OUR_COUNTING = FlopsCounting.MCORE_WINDOWED
"""How our TFLOPs are counted: Megatron-Core's way, sliding windows counted as windows."""


class FlopsConvention(StrEnum):
    """The count behind a printed TFLOPs or MFU. `CONVENTIONS` says what each one means."""

    MCORE = "mcore"
    BRIDGE_GPTOSS_OLD = "mcore-bridge-gptoss-old"
    BRIDGE_GPTOSS_INTERMEDIATE = "mcore-bridge-gptoss-intermediate"
    BRIDGE_GPTOSS_NEW = "mcore-bridge-gptoss-new"
    MCORE_FULL_ATTENTION = "mcore-old-fullattn"
    AUTOMODEL = "automodel"
    DGXC = "dgxc"
    TORCHTITAN = "torchtitan"
    PRIMUS = "primus"
    MAXTEXT = "maxtext"
    DERIVED = "derived"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Convention:
    """What a count contains; None where the source does not let it be seen."""

    causal_half: bool | None
    """Half of the score matrix is counted, as a causal kernel computes it."""
    mtp: bool | None
    """Multi-token prediction layers are counted where they are trained."""
    sliding_window: bool | None
    """Attention of a windowed layer is counted over its window."""
    meaning: str
    source: str
    counting: FlopsCounting | None = None
    """How our arithmetic counts so; None where the source gives no formula."""
    meant: FlopsCounting | None = None
    """What the source meant to count, where it was mistaken; None where it counted what it meant."""


CONVENTIONS: dict[FlopsConvention, Convention] = {
    FlopsConvention.MCORE: Convention(
        causal_half=True,
        mtp=True,
        sliding_window=None,
        meaning="GEMMs and LM head (padded vocabulary), no embedding, no router; windows in Bridge only",
        source="NVIDIA/Megatron-LM num_floating_point_operations since 8873b55d6a (MLA since d4f9a6f7b4)",
        counting=FlopsCounting.MCORE,
    ),
    FlopsConvention.BRIDGE_GPTOSS_OLD: Convention(
        causal_half=True,
        mtp=None,
        sliding_window=False,
        meaning="gated experts counted as two matrices, not three: 27.1 GFLOP/token for GPT-OSS-120B at 4k",
        source="NVIDIA-NeMo/Megatron-Bridge tables 25.11 to 26.04.01, corrected in pull request 3947",
        counting=FlopsCounting.MCORE_UNGATED_EXPERTS,
        meant=FlopsCounting.MCORE_WINDOWED,
    ),
    FlopsConvention.BRIDGE_GPTOSS_INTERMEDIATE: Convention(
        causal_half=None,
        mtp=None,
        sliding_window=None,
        meaning="as the new count with a vocabulary near 32,000 (inferred): 29.7 (120B), 20.0 (20B)",
        source="NVIDIA-NeMo/Megatron-Bridge verification cards of GPT-OSS, functional runs of 2026-08",
        meant=FlopsCounting.MCORE_WINDOWED,
    ),
    FlopsConvention.BRIDGE_GPTOSS_NEW: Convention(
        causal_half=True,
        mtp=None,
        sliding_window=True,
        meaning="as mcore, with windows: 32.6 GFLOP/token for GPT-OSS-120B at 4k",
        source="NVIDIA-NeMo/Megatron-Bridge tables 26.06 and later",
        counting=FlopsCounting.MCORE_WINDOWED,
    ),
    FlopsConvention.MCORE_FULL_ATTENTION: Convention(
        causal_half=False,
        mtp=False,
        sliding_window=False,
        meaning="mcore before the causal half was introduced; for arXiv:2504.14960 inferred, not stated",
        source="NVIDIA/Megatron-LM before 8873b55d6a (2025-03-06), core_v0.8 to v0.10; MoE Parallel Folding",
        counting=FlopsCounting.MCORE_FULL_ATTENTION,
    ),
    FlopsConvention.AUTOMODEL: Convention(
        causal_half=True,
        mtp=False,
        sliding_window=True,
        meaning="as mcore without MTP; for GPT-OSS it takes a head size of 45, not 64, and gives 7 % less",
        source="NVIDIA-NeMo/Automodel nemo_automodel/components/utils/flops_utils.py",
        counting=FlopsCounting.AUTOMODEL,
    ),
    FlopsConvention.DGXC: Convention(
        causal_half=True,
        mtp=None,
        sliding_window=None,
        meaning="closed formula per model; DeepSeek and Qwen rows of the same repository are mcore",
        source="NVIDIA/dgxc-benchmarking README files of Grok-1, Llama and Nemotron-H",
        counting=FlopsCounting.DGXC,
    ),
    FlopsConvention.TORCHTITAN: Convention(
        causal_half=False,
        mtp=False,
        sliding_window=False,
        meaning="full attention on purpose, with router: DeepSeek-V3 281 GFLOP/token at 4k, mcore 250",
        source="pytorch/torchtitan models/utils.py",
        counting=FlopsCounting.TORCHTITAN,
    ),
    FlopsConvention.PRIMUS: Convention(
        causal_half=None,
        mtp=None,
        sliding_window=None,
        meaning="Megatron's counter inside Primus; Qwen3-235B rows imply the same 148.0 GFLOP/token",
        source="AMD-AGI/Primus",
        counting=FlopsCounting.MCORE,
    ),
    FlopsConvention.MAXTEXT: Convention(
        causal_half=None,
        mtp=None,
        sliding_window=None,
        meaning="MFU of a TPU's peak by MaxText's own count",
        source="AI-Hypercomputer/maxtext",
    ),
    FlopsConvention.DERIVED: Convention(
        causal_half=None,
        mtp=None,
        sliding_window=None,
        meaning="the source prints no FLOPs; throughput follows from GPU-hours and tokens",
        source="arXiv:2412.19437, table 1",
    ),
    FlopsConvention.UNKNOWN: Convention(
        causal_half=None,
        mtp=None,
        sliding_window=None,
        meaning="FLOPs or MFU printed without saying how they were counted",
        source="vendor reports of 2024 and 2025",
    ),
}
