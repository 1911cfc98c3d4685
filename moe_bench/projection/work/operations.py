"""What one layer asks of a GPU per micro batch: operations with their work, and messages with their bytes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from moe_bench.analysis.collectives import Collective, Group


class Pass(StrEnum):
    """Which pass of a micro batch an operation belongs to."""

    FORWARD = "forward"
    DGRAD = "dgrad"
    WGRAD = "wgrad"
    RECOMPUTE = "recompute"


class Part(StrEnum):
    """The part of a layer whose time it is, as the waterfall names it."""

    ATTENTION_PROJECTIONS = "attention projections"
    ATTENTION = "attention"
    STATE_MIXER = "state-space mixer"
    DENSE_MLP = "dense MLP"
    EXPERTS = "experts"
    LATENT = "latent projections"
    SHARED_EXPERTS = "shared experts"
    ROUTER = "router"
    PERMUTATION = "permute and unpermute"
    NORMS = "norms and residuals"
    QUANTIZATION = "quantization"
    LM_HEAD = "LM head and loss"


class Number(StrEnum):
    """Number format of a matrix product's factors, as rates are tabulated."""

    BF16 = "bf16"
    FP8_TENSORWISE = "fp8_tensorwise"
    FP8_BLOCKWISE = "fp8_blockwise"
    MXFP8 = "mxfp8"
    NVFP4 = "nvfp4"

    @property
    def element_bytes(self) -> float:
        """Bytes of one element, block scales included."""
        return _ELEMENT_BYTES[self]


_ELEMENT_BYTES = {
    Number.BF16: 2.0,
    Number.FP8_TENSORWISE: 1.0,
    Number.FP8_BLOCKWISE: 1.0,
    Number.MXFP8: 1 + 1 / 32,
    Number.NVFP4: 1 / 2 + 1 / 16,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemm:
    """Products of `num_groups` pairs of matrices, [rows, inner] x [inner, columns] each."""

    part: Part
    in_pass: Pass
    num_rows: float
    """Rows of one group; of grouped experts, tokens per expert."""
    num_inner: float
    num_columns: float
    num_groups: int = 1
    number: Number = Number.BF16
    accumulates: bool = False
    """Whether the product is added to a gradient, which is read and written."""
    gradient_bytes: int = 4
    """Of an element of that gradient: 4 in FP32, 2 in BF16."""

    @property
    def num_flops(self) -> float:
        """2 m n k per group."""
        return 2.0 * self.num_groups * self.num_rows * self.num_inner * self.num_columns

    @property
    def num_bytes(self) -> float:
        """Both factors read once; the product written in BF16, or the gradient read and written."""
        factors = (self.num_rows + self.num_columns) * self.num_inner * self.number.element_bytes
        product = self.num_rows * self.num_columns * (2 * self.gradient_bytes if self.accumulates else 2)
        return self.num_groups * (factors + product)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCore:
    """Scores, softmax and weighted values of causal attention on one rank."""

    in_pass: Pass
    num_flops: float
    """Of the forward pass, or of all five products backward, with the mask's share only."""
    seq_len: int
    """Tokens that a query may see at most: the sequence, or the window."""
    context: int
    """Context-parallel ranks, each of which works on its share of the sequence at a time."""
    qk_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBound:
    """An operation whose time is that of the bytes it moves."""

    part: Part
    in_pass: Pass
    num_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A collective of one layer, made once per micro batch and pass."""

    op: Collective
    group: Group
    in_pass: Pass
    num_bytes: float
    """As `analysis/collectives.py` counts it."""
    what: str = ""
    """What it carries; the hops of one dispatch over both links say the same."""
    is_overlapped: bool = False
    """Whether a fused kernel (Transformer Engine's user buffers) hides most of it under its product."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateUpdate:
    """The scan of a Mamba-2 or gated-delta-net layer on one rank, chunk by chunk."""

    in_pass: Pass
    num_flops: float
    is_delta_rule: bool
    """Whether states are corrected (gated delta nets), which chains small triangular products, or only
    decay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseCore:
    """Scores, and values where they belong to it, of some keys per query on one rank."""

    in_pass: Pass
    num_flops: float
    num_keys: float
    """Keys that a query sees at most."""


Operation = Gemm | AttentionCore | MemoryBound | StateUpdate | SparseCore


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWork:
    """One kind of layer of one recipe, per micro batch and rank."""

    operations: tuple[Operation, ...]
    messages: tuple[Message, ...]
    num_launches: float
    """Kernels that the host starts, forward and backward together."""
