"""What a calibration may be asked to time, with which kernels, how often, and in how much memory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Literal, Self, get_args

from moe_bench.errors import BadInputError
from moe_bench.results.calibration import (
    AttentionCore,
    DenseGemm,
    Dtype,
    GroupedGemm,
    Launch,
    MemoryBound,
    MoeLayer,
    Operation,
    Sustained,
    Task,
)

OperationName = Literal[
    "dense_gemm",
    "grouped_gemm",
    "attention",
    "permutation",
    "norm",
    "router",
    "optimizer_step",
    "copy",
    "launch",
    "sustained",
]
OPERATIONS: tuple[OperationName, ...] = get_args(OperationName)

FLUSH_BYTES = 256 * 1024**2
"""Written before each sample: twice the largest L2 of the GPUs in recipes/systems (126 MB, B200)."""

NUM_WARMUP = 3
MIN_SAMPLES, MAX_SAMPLES = 10, 50
TARGET_S = 0.1
"""Seconds that the samples of one short operation take together."""

NUM_BURSTS = 5
BURST_S = 0.02
PAUSE_S = 2.0
"""Before each burst, so that the GPU is cool and its clocks are up."""
WINDOW_S = 0.25
"""Of sustained work, one sample."""

LAUNCHED_LAYERS = 4
"""Of Megatron-Core, whose host time is measured as that of so many more layers."""


def num_samples(call_s: float) -> int:
    """How often to time an operation that takes `call_s` with what is done before it."""
    return max(MIN_SAMPLES, min(MAX_SAMPLES, round(TARGET_S / call_s)))


class Implementation(StrEnum):
    """Kernels and library calls, as files name them."""

    MM = "torch.mm"
    SCALED_MM_TENSORWISE = "torch._scaled_mm, one scale per tensor"
    SCALED_MM_ROWWISE = "torch._scaled_mm, one scale per row"
    TE_LINEAR = "transformer_engine Linear"
    GROUPED_MM = "torch.nn.functional.grouped_mm"
    SCALED_GROUPED_MM = "torch.nn.functional.scaled_grouped_mm, one scale per row"
    TE_GROUPED_LINEAR = "transformer_engine GroupedLinear"
    SDPA_FLASH = "torch scaled_dot_product_attention, flash kernel"
    FLEX = "torch flex_attention"
    TE_ATTENTION = "transformer_engine DotProductAttention"
    INDEXING = "torch index_select and index_add"
    TE_PERMUTE = "transformer_engine moe_permute and moe_unpermute"
    ADD = "torch.add"
    RMS_NORM = "torch.nn.functional.rms_norm"
    TE_RMS_NORM = "transformer_engine RMSNorm"
    ROUTER = "torch top-k routing, step by step"
    ADAMW = "torch.optim.AdamW, fused"
    STORED_ADAM = "moe_bench StoredBf16Adam"
    TE_ADAM = "transformer_engine FusedAdam"
    COPY = "torch.Tensor.copy_"
    ADD_IN_PLACE = "torch.Tensor.add_"
    MEGATRON_LAYERS = "Megatron-Core layers, torch-native kernels"
    MOE_LAYER = "moe_bench grouped experts"

    @property
    def package(self) -> str | None:
        """What must be installed beside torch and Megatron-Core."""
        return "transformer_engine" if self.value.startswith("transformer_engine ") else None


COMPILED = (Implementation.FLEX, Implementation.STORED_ADAM)
"""Those that torch.compile makes on a GPU, shape by shape."""


RMS_NORM, RESIDUAL = "rmsnorm", "residual"
ADAM, ADAM_BF16_MOMENTS = "adam", "adam with bf16 moments"
DEVICE_TO_DEVICE, HOST_TO_DEVICE, DEVICE_TO_HOST = "device to device", "host to device", "device to host"
"""Variants of operations that move memory; host memory is pinned."""


_MEMORY: Mapping[str, tuple[Implementation, ...]] = MappingProxyType(
    {
        RMS_NORM: (Implementation.RMS_NORM, Implementation.TE_RMS_NORM),
        RESIDUAL: (Implementation.ADD,),
        ADAM: (Implementation.ADAMW, Implementation.TE_ADAM),
        ADAM_BF16_MOMENTS: (Implementation.STORED_ADAM,),
        "permutation": (Implementation.INDEXING, Implementation.TE_PERMUTE),
        "router": (Implementation.ROUTER,),
        "copy": (Implementation.COPY,),
    }
)
"""By variant, or where that holds numbers by operation."""


def implementations_of(what: Operation | MoeLayer, dtype: Dtype) -> tuple[Implementation, ...]:
    """Everything that can do `what`, installed here or not; BadInputError for an unknown variant of it."""
    is_fp8 = dtype.startswith("fp8")
    match what:
        case DenseGemm():
            scaled = (Implementation.SCALED_MM_TENSORWISE, Implementation.SCALED_MM_ROWWISE)
            return scaled if is_fp8 else (Implementation.MM, Implementation.TE_LINEAR)
        case GroupedGemm():
            plain = (Implementation.GROUPED_MM, Implementation.TE_GROUPED_LINEAR)
            return (Implementation.SCALED_GROUPED_MM,) if is_fp8 else plain
        case AttentionCore():
            own = Implementation.FLEX if what.window_tokens else Implementation.SDPA_FLASH
            return (own, Implementation.TE_ATTENTION)
        case MemoryBound():
            found = _MEMORY.get(what.variant) or _MEMORY.get(what.operation)
            if found is None:
                raise BadInputError(f"{what.operation}: {what.variant}: nothing here does it")
            return found
        case Launch():
            through = Implementation.MEGATRON_LAYERS if what.layers_of else Implementation.ADD_IN_PLACE
            return (through,)
        case MoeLayer():
            return (Implementation.MOE_LAYER,)
        case Sustained():
            return implementations_of(what.work, dtype)[:1]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterVariant:
    """How experts are chosen from the scores [tokens, experts] of an input."""

    score: Literal["softmax", "sigmoid"]
    top_k: int
    num_groups: int | None = None
    """Experts are chosen in the best `group_top_k` of these only (arXiv:2412.19437, 2.1.2)."""
    group_top_k: int | None = None

    def __str__(self) -> str:
        groups = f" in {self.group_top_k} of {self.num_groups} groups" if self.num_groups else ""
        return f"{self.score} top-{self.top_k}{groups}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The variant that prints as `text`."""
        found = re.fullmatch(r"(softmax|sigmoid) top-(\d+)(?: in (\d+) of (\d+) groups)?", text)
        if found is None:
            raise BadInputError(f"{text}: no way of routing; as `sigmoid top-8 in 4 of 8 groups`")
        return cls(
            score="softmax" if found[1] == "softmax" else "sigmoid",
            top_k=int(found[2]),
            group_top_k=int(found[3]) if found[3] else None,
            num_groups=int(found[4]) if found[4] else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PermutationVariant:
    """How often rows are ordered by expert, with their return: all of it is one operation."""

    top_k: int
    """Rows per token of the input; 1: the rows that arrive, as DeepEP and HybridEP leave them."""
    is_sorted_again: bool = False
    """Whether rows that arrive are ordered a second time, by local expert (all-to-all dispatch)."""

    def __str__(self) -> str:
        again = ", sorted again" if self.is_sorted_again else ""
        return f"{self.top_k} rows per token{again}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The variant that prints as `text`."""
        found = re.fullmatch(r"(\d+) rows per token(, sorted again)?", text)
        if found is None:
            raise BadInputError(f"{text}: no permutation; as `8 rows per token, sorted again`")
        return cls(top_k=int(found[1]), is_sorted_again=bool(found[2]))


def memory_bytes(task: Task) -> int:
    """Device memory of a task: what it moves, each byte once, and the buffer that flushes the L2."""
    return task.what.num_bytes(task.dtype) + FLUSH_BYTES
