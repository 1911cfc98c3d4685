"""What single operations achieve on one GPU, as measured: where the projection takes its rates from.

A file holds one measurement run on one GPU, `results/calibration/<gpu>/<start>-<commit>-<job>.json`: raw
seconds of every operation, shape and dtype. Rates are computed on read from the work that the shape implies.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moe_bench.results.record import GitState, GpuFacts
from moe_bench.results.versioned import read_versioned
from moe_bench.spec.base import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Spec, Text

SCHEMA_VERSION = 2
"""1: first layout. 2: sustained work, ways of launching, clocks of each measurement, what could not be
measured, and the mark of toy shapes; files of version 1 lack these, and are read."""
OLDER_VERSIONS = (1,)

CPU = "cpu"
"""Name of the "GPU" of a file that was measured without one; no system has a GPU of this name."""

Dtype = Literal["fp32", "bf16", "fp8_e4m3", "fp8_e5m2"]
Direction = Literal["forward", "dgrad", "wgrad"]
_BYTES_PER_ELEMENT = {"fp32": 4, "bf16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1}


class DenseGemm(Spec):
    """One matrix product, [rows, inner] x [inner, columns]."""

    operation: Literal["dense_gemm"]
    num_rows: PositiveInt
    num_inner: PositiveInt
    num_columns: PositiveInt

    @property
    def num_flops(self) -> int:
        """A multiplication and an addition per element of the product's volume."""
        return 2 * self.num_rows * self.num_inner * self.num_columns

    def num_bytes(self, dtype: Dtype) -> int:
        """Both factors read and the product written, once."""
        elements = (
            self.num_rows * self.num_inner
            + self.num_inner * self.num_columns
            + self.num_rows * self.num_columns
        )
        return elements * _BYTES_PER_ELEMENT[dtype]


class GroupedGemm(Spec):
    """The products of all local experts in one kernel: expert e has `tokens_per_expert[e]` rows.

    `forward` is [tokens, inputs] x [inputs, outputs], `dgrad` [tokens, outputs] x [outputs, inputs], `wgrad`
    [inputs, tokens] x [tokens, outputs]: the same work, another shape.
    """

    operation: Literal["grouped_gemm"]
    direction: Direction
    tokens_per_expert: tuple[NonNegativeInt, ...] = Field(min_length=1)
    num_inputs: PositiveInt
    num_outputs: PositiveInt
    accumulates_fp32: bool = False
    """Whether `wgrad` adds to a gradient in FP32."""

    @model_validator(mode="after")
    def _require_wgrad(self) -> Self:
        if self.accumulates_fp32 and self.direction != "wgrad":
            raise ValueError(f"accumulates_fp32 in {self.direction}: only wgrad adds to a gradient")
        return self

    @property
    def num_flops(self) -> int:
        """2 x tokens x inputs x outputs, in every direction."""
        return 2 * sum(self.tokens_per_expert) * self.num_inputs * self.num_outputs

    def num_bytes(self, dtype: Dtype) -> int:
        """Rows on both sides and the experts' weights or gradients once; what is added to twice."""
        rows = sum(self.tokens_per_expert) * (self.num_inputs + self.num_outputs)
        weights = len(self.tokens_per_expert) * self.num_inputs * self.num_outputs
        weight_bytes = weights * (2 * 4 if self.accumulates_fp32 else _BYTES_PER_ELEMENT[dtype])
        return rows * _BYTES_PER_ELEMENT[dtype] + weight_bytes


class AttentionCore(Spec):
    """Causal attention after the projections; a window where each query sees the nearest tokens only."""

    operation: Literal["attention"]
    direction: Literal["forward", "backward"]
    num_seqs: PositiveInt
    seq_len: PositiveInt
    num_heads: PositiveInt
    num_query_groups: PositiveInt
    qk_head_dim: PositiveInt
    v_head_dim: PositiveInt
    window_tokens: PositiveInt | None = None

    @property
    def num_pairs(self) -> int:
        """Query and key pairs of one head and sequence that the mask leaves: the triangle, or its band."""
        window = min(self.window_tokens or self.seq_len, self.seq_len)
        return window * (window + 1) // 2 + (self.seq_len - window) * window

    @property
    def num_flops(self) -> int:
        """Scores and weighted sum of what the mask leaves; 2.5 times that backward (arXiv:2307.08691, 4.1).

        Backward has five products where forward has two: scores again, and the gradients of all four factors.
        """
        qk, v = self.qk_head_dim, self.v_head_dim
        per_pair = 2 * (qk + v) if self.direction == "forward" else 2 * (3 * qk + 2 * v)
        return self.num_seqs * self.num_heads * self.num_pairs * per_pair

    def num_bytes(self, dtype: Dtype) -> int:
        """Queries, keys, values and output once; backward the four and their gradients."""
        queries = self.num_heads * (self.qk_head_dim + self.v_head_dim)
        keys = self.num_query_groups * (self.qk_head_dim + self.v_head_dim)
        elements = self.num_seqs * self.seq_len * (queries + keys)
        return elements * _BYTES_PER_ELEMENT[dtype] * (1 if self.direction == "forward" else 2)


class MemoryBound(Spec):
    """An operation that moves tensors and computes little: what it must read and write is stated."""

    operation: Literal["permutation", "norm", "router", "optimizer_step", "copy"]
    direction: Literal["forward", "backward"] = "forward"
    variant: Text
    """Which one, such as `unpermute`, `rmsnorm`, `sigmoid top-8 of 256`, `adam`, `device to host`."""
    shape: tuple[PositiveInt, ...] = Field(min_length=1)
    """Of the main input; for an optimizer step, the number of parameters."""
    num_read_bytes: NonNegativeInt
    num_written_bytes: NonNegativeInt
    num_flops: NonNegativeInt = 0

    def num_bytes(self, dtype: Dtype) -> int:
        """What it must move, whatever the dtype of its main input."""
        return self.num_read_bytes + self.num_written_bytes


class Launch(Spec):
    """The host's time to start kernels that do next to nothing."""

    operation: Literal["launch"]
    num_kernels: PositiveInt
    layers_of: Text | None = None
    """Model whose layers at toy widths start them through Megatron-Core, forward and backward, with the time
    of its modules and of autograd; the kernels are then those that the projection counts. None: one call
    after another."""

    @property
    def num_flops(self) -> int:
        """Nothing is computed."""
        return 0

    def num_bytes(self, dtype: Dtype) -> int:
        """Nothing is moved."""
        return 0


class MoeLayer(Spec):
    """Forward and backward of a MoE layer on one rank without communication: router, permutation, gated
    experts, sum of what they return; every expert receives as many tokens.
    """

    operation: Literal["moe_layer"]
    num_tokens: PositiveInt
    hidden_size: PositiveInt
    expert_ffn_hidden_size: PositiveInt
    num_experts: PositiveInt
    """On this rank."""
    top_k: PositiveInt

    @property
    def num_flops(self) -> int:
        """Three projections of every copy of a token (arXiv:2002.05202), each with two gradients."""
        return 18 * self.num_tokens * self.top_k * self.hidden_size * self.expert_ffn_hidden_size

    def num_bytes(self, dtype: Dtype) -> int:
        """Weights and gradients of the experts once, and every copy of a token on both sides of the experts
        and between their projections, forward and backward.
        """
        weights = 3 * self.num_experts * self.hidden_size * self.expert_ffn_hidden_size
        rows = self.num_tokens * self.top_k * (2 * self.hidden_size + 3 * self.expert_ffn_hidden_size)
        return 2 * (weights + rows) * _BYTES_PER_ELEMENT[dtype]


class Sustained(Spec):
    """The same work without a pause, which is what a training step does to clocks and power."""

    operation: Literal["sustained"]
    work: Annotated[DenseGemm | AttentionCore | MemoryBound | MoeLayer, Field(discriminator="operation")]
    held_s: NonNegativeFloat
    """For so long, a sample being the mean call of one short window; 0: bursts, each after a pause."""

    @property
    def num_flops(self) -> int:
        """Of one call."""
        return self.work.num_flops

    def num_bytes(self, dtype: Dtype) -> int:
        """Of one call."""
        return self.work.num_bytes(dtype)


Operation = Annotated[
    DenseGemm | GroupedGemm | AttentionCore | MemoryBound | Launch | Sustained,
    Field(discriminator="operation"),
]


class Task(Spec):
    """One operation to be timed, and with what."""

    what: Operation
    dtype: Dtype
    """Of the inputs; sums are FP32."""
    implementation: Text
    """Kernel or library call, as `torch.nn.functional.grouped_mm`."""


class Measurement(Task):
    """One operation, timed so often."""

    cold_l2: bool
    """Whether the L2 cache was flushed before each sample."""
    samples_s: tuple[PositiveFloat, ...] = Field(min_length=1)
    """One call each, in the order in which they ran."""
    start_sm_clock_hz: PositiveFloat | None = None
    """Before the first sample."""
    end_sm_clock_hz: PositiveFloat | None = None
    """After the last one."""

    @property
    def median_s(self) -> float:
        """Median of the samples."""
        return statistics.median(self.samples_s)

    @property
    def flops_per_s(self) -> float | None:
        """Achieved rate; None for what computes nothing that counts."""
        return self.what.num_flops / self.median_s if self.what.num_flops else None

    @property
    def bytes_per_s(self) -> float | None:
        """Rate at which the bytes that must move did; None for what moves none."""
        num_bytes = self.what.num_bytes(self.dtype)
        return num_bytes / self.median_s if num_bytes else None


class Unmeasured(Task):
    """One operation that was asked for and gave no number."""

    reason: Text
    """As `transformer_engine is not installed`."""


class CalibrationProvenance(Spec):
    """Where, when and with what a file was measured."""

    started_at: Text
    """UTC, ISO 8601."""
    command: tuple[str, ...]
    job_id: Text
    git: GitState
    python_version: Text
    packages: dict[str, str]
    host: Text
    gpu: GpuFacts
    """Before the first sample; its name is `cpu` where there is none."""
    end_sm_clock_hz: PositiveFloat | None = None
    """After the last one: far below `gpu.sm_clock_hz`, the GPU was throttled."""
    cuda_version: str | None
    environment: dict[str, str]


class Calibration(Spec):
    """One measurement run on one GPU, written once."""

    schema_version: Literal[1, 2] = 2
    is_tiny: bool = False
    """Whether shapes were toys: the file says that the command works, and nothing about rates."""
    provenance: CalibrationProvenance
    measurements: tuple[Measurement, ...] = Field(min_length=1)
    unmeasured: tuple[Unmeasured, ...] = ()

    @property
    def is_evidence(self) -> bool:
        """Whether a projection may learn from it: real shapes on a GPU."""
        return not self.is_tiny and self.provenance.gpu.name != CPU


def read_calibration(path: Path) -> Calibration:
    """The measurements in `path`; RecordError names the file, the field and what is wrong with it."""
    return read_versioned(
        path, Calibration, what="calibration file", version=SCHEMA_VERSION, older=OLDER_VERSIONS
    )
