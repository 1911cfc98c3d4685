"""Collects the operations of one layer: a product brings its gradients and, recomputed, itself again."""

from __future__ import annotations

from dataclasses import dataclass, field

from moe_bench.analysis.activations import keeps_experts_row_wise, multiplies_experts_row_wise
from moe_bench.analysis.state_comms import gradient_bytes
from moe_bench.projection.work.operations import Gemm, MemoryBound, Number, Operation, Part, Pass
from moe_bench.spec.recipe import GraphModule, Precision, Recipe, RecomputeModule

NUMBERS: dict[Precision, Number] = {
    "bf16": Number.BF16,
    "fp8_delayed": Number.FP8_TENSORWISE,
    "fp8_tensorwise": Number.FP8_TENSORWISE,
    "fp8_rowwise": Number.FP8_TENSORWISE,
    "fp8_blockwise": Number.FP8_BLOCKWISE,
    "mxfp8": Number.MXFP8,
    "nvfp4": Number.NVFP4,
}
"""Format of the matrix products by a recipe's precision; FP32 training is not projected. Scales per row are
applied to the product as one per tensor is, by kernels of the same tensor cores; only experts have them."""

_READS_PER_QUANTIZATION = {"fp8_tensorwise": 2, "nvfp4": 2}
"""Current scaling reads a tensor for its largest value before it quantizes it; NVFP4 for its global scale."""

_FUSED_QUANTIZATION = 0.25
"""Of the bytes, what is left where Transformer Engine's fused grouped MLP quantizes in the epilogue of the
product before: the dispatched tokens at its start."""

_BF16_BYTES = 2

_COLLECTIVE_LAUNCHES = 20
"""Kernels that one tensor-parallel collective costs the host as much time as: its process group, events and
waits, and the order that CUDA_DEVICE_MAX_CONNECTIONS=1 forces on all streams. Chosen between 0 and 22 by rows
left out of the fit (docs/accuracy.md, what was tried)."""
_USER_BUFFER_LAUNCHES = 10
"""The same where Transformer Engine's user buffers move the pieces of a product without torch's process
groups: 30 calls of the driver with four ranks, 65 with eight (common/comm_gemm_overlap/comm_gemm_overlap.cpp,
split_overlap_ag). Chosen among 0, 2, 5, 10 and 20 by rows left out of the fit."""
_REPLAY_LAUNCHES = 12
"""The same of one recomputed module, whose checkpoint saves and restores the generators' states: 0.35 to
0.88 ms a module in Megatron-Bridge's matched runs of Moonlight (results/published/moonlight_16b_a3b.yaml)."""
_GRAPH_LAUNCHES = 30
"""The same of the CUDA graph of a layer or of parts of it, replayed forward and backward: inputs copied to
where they were captured, autograd's function over every weight inside, two launches. Matched runs of
Megatron-Bridge on 16 H100 (skills/nemo-mbridge-perf-cuda-graphs/card.yaml at 067f987df03b): graphs of
attention, router and preprocessing make a step of GPT-OSS-20B 1.17 to 1.33 times as fast, where free replays
would make it 1.36 times, these 1.33; one of Qwen3-30B over all-to-all 0.98 times. Between 20 and 50 published
rows are ordered alike."""
_FORWARD_SHARE = 1 / 3
"""Of a layer's launches, those of its forward pass: forward, dgrad and wgrad."""

Modules = frozenset[RecomputeModule]
NO_MODULES: Modules = frozenset()


@dataclass(slots=True, kw_only=True)
class Tally:
    """The operations of one layer of `recipe`, added part by part."""

    recipe: Recipe
    number: Number
    """Format of this layer's matrix products."""
    is_whole_recomputed: bool = False
    """Whether the backward pass runs the whole layer forward again."""
    stops_early: bool = False
    """Whether that ends where the last saved tensor is back, as torch's own checkpointing does: the products
    and messages behind it do not run again."""
    fuses_attention: bool = True
    fuses_expert_biases: bool = False
    bf16_parts: frozenset[Part] = frozenset()
    """All as in `Traits`."""
    operations: list[Operation] = field(default_factory=list)
    num_launches: float = 0.0
    replayed: set[RecomputeModule] = field(default_factory=set)
    """Modules of this layer that the backward pass runs forward again."""

    def gemm(
        self,
        part: Part,
        rows: float,
        inner: float,
        columns: float,
        *,
        num_groups: int = 1,
        number: Number | None = None,
        repeated_by: Modules = NO_MODULES,
        is_last: bool = False,
    ) -> None:
        """A projection of `inner` to `columns` channels for `rows` tokens, per group.

        Y = X W, dX = dY W^T and dW += X^T dY. `is_last` says that nothing behind it is kept for the gradient.
        """
        is_row_wise = part is Part.EXPERTS and multiplies_experts_row_wise(self.recipe)
        own = Number.BF16 if part in self.bf16_parts else self.number
        weight_form = own if number is None else number
        form = NUMBERS[self.recipe.precision] if is_row_wise else weight_form
        for in_pass in self.forward_passes(repeated_by, is_last=is_last):
            self.operations.append(
                Gemm(
                    part=part,
                    in_pass=in_pass,
                    num_rows=rows,
                    num_inner=inner,
                    num_columns=columns,
                    num_groups=num_groups,
                    number=form,
                )
            )
        self.operations.append(
            Gemm(
                part=part,
                in_pass=Pass.DGRAD,
                num_rows=rows,
                num_inner=columns,
                num_columns=inner,
                num_groups=num_groups,
                number=form,
            )
        )
        self.operations.append(
            Gemm(
                part=part,
                in_pass=Pass.WGRAD,
                num_rows=columns,
                num_inner=rows,
                num_columns=inner,
                num_groups=num_groups,
                number=weight_form,
                accumulates=True,
                gradient_bytes=gradient_bytes(self.recipe),
            )
        )
        if is_row_wise:
            self._quantize_row_wise(rows, inner, columns, num_groups, repeated_by)
        elif form is not Number.BF16:
            self._quantize(part, num_groups * rows, inner, columns, repeated_by)

    def select(
        self, part: Part, rows: float, num_entries: float, columns: float, *, repeated_by: Modules
    ) -> None:
        """Rows of a table of `num_entries` by a product in BF16, X one-hot: Y = X W and dW += X^T dY."""
        for in_pass in self.forward_passes(repeated_by):
            self.operations.append(
                Gemm(
                    part=part,
                    in_pass=in_pass,
                    num_rows=rows,
                    num_inner=num_entries,
                    num_columns=columns,
                )
            )
        self.operations.append(
            Gemm(
                part=part,
                in_pass=Pass.WGRAD,
                num_rows=columns,
                num_inner=rows,
                num_columns=num_entries,
                accumulates=True,
                gradient_bytes=gradient_bytes(self.recipe),
            )
        )

    def move(
        self,
        part: Part,
        *,
        forward_bytes: float,
        backward_bytes: float,
        repeated_by: Modules = NO_MODULES,
        is_last: bool = False,
    ) -> None:
        """An operation bound by memory, and its gradient's; none where no byte moves."""
        for in_pass in self.forward_passes(repeated_by, is_last=is_last):
            if forward_bytes:
                self.operations.append(MemoryBound(part=part, in_pass=in_pass, num_bytes=forward_bytes))
        if backward_bytes:
            self.operations.append(MemoryBound(part=part, in_pass=Pass.DGRAD, num_bytes=backward_bytes))

    def launch(self, count: float, *, captured_by: GraphModule | None = None) -> None:
        """Kernels that the host starts for one part, forward and backward; none inside a CUDA graph."""
        graphs = self.recipe.cuda_graphs
        if graphs.implementation == "full_iteration":
            return
        is_captured = not graphs.modules or captured_by in graphs.modules
        if graphs.implementation == "none" or not is_captured:
            self.num_launches += count

    def launch_around(self, *, num_collectives: int) -> None:
        """What the host does beside the kernels of a layer whose parts have all been added: tensor-parallel
        collectives, and the recomputation of modules or of the whole layer.
        """
        is_pieced = self.recipe.overlap.tensor_parallel
        per_collective = _USER_BUFFER_LAUNCHES if is_pieced else _COLLECTIVE_LAUNCHES
        self.launch(per_collective * num_collectives, captured_by="attn")
        if self.is_whole_recomputed:
            self.num_launches *= 1 + _FORWARD_SHARE
        self.launch(_REPLAY_LAUNCHES * len(self.replayed))
        if self.recipe.cuda_graphs.implementation in ("local", "transformer_engine"):
            self.num_launches += _GRAPH_LAUNCHES

    def forward_passes(self, repeated_by: Modules, *, is_last: bool = False) -> tuple[Pass, ...]:
        """The passes in which a forward operation of these modules runs."""
        if is_last and self.stops_early:
            return (Pass.FORWARD,)
        recompute = self.recipe.recompute
        selected = (
            repeated_by & set(recompute.modules) if recompute.granularity == "selective" else NO_MODULES
        )
        self.replayed |= selected
        if self.is_whole_recomputed or selected:
            return (Pass.FORWARD, Pass.RECOMPUTE)
        return (Pass.FORWARD,)

    @property
    def fuses_epilogues(self) -> bool:
        """Whether the experts run in Transformer Engine's fused grouped MLP, which knows no biases."""
        return self.recipe.kernels.op_fuser and not self.recipe.model.linear_bias

    def _quantize_row_wise(
        self, rows: float, inner: float, columns: float, num_groups: int, repeated_by: Modules
    ) -> None:
        """Tokens for the output and the output's gradient for the input's: read in BF16 and written once.

        Weights are quantized once per step and left out, as for Transformer Engine; where they do not stay
        (Megatron-FSDP) at every use, and read twice to be transposed (harness/kernels/fp8_quantize.py).
        """
        once = _BF16_BYTES + NUMBERS[self.recipe.precision].element_bytes
        weights = 0.0 if keeps_experts_row_wise(self.recipe) else num_groups * inner * columns
        self.move(
            Part.QUANTIZATION,
            forward_bytes=once * (num_groups * rows * inner + weights),
            backward_bytes=once * (num_groups * rows * columns + weights) + _BF16_BYTES * weights,
            repeated_by=repeated_by,
        )

    def _quantize(self, part: Part, rows: float, inner: float, columns: float, repeated_by: Modules) -> None:
        """Input and output gradient quantized, each row-wise for one product and column-wise for another:
        read in BF16 and written twice. Weights are quantized once per step and kept (Transformer Engine's
        is_first_microbatch), which is left out.
        """
        fused = _FUSED_QUANTIZATION if part is Part.EXPERTS and self.fuses_epilogues else 1.0
        reads = _READS_PER_QUANTIZATION.get(self.recipe.precision, 1)
        per_element = fused * (reads * _BF16_BYTES + 2 * self.number.element_bytes)
        self.move(
            Part.QUANTIZATION,
            forward_bytes=rows * inner * per_element,
            backward_bytes=rows * columns * per_element,
            repeated_by=repeated_by,
        )
