"""The operations of a recipe as shapes to be measured, with the time that the projection gives to each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace

from moe_bench.analysis.activations import token_counts
from moe_bench.analysis.dispatch import dispatched_rows
from moe_bench.projection.efficiency import Efficiency
from moe_bench.projection.step_work import optimizer_bytes
from moe_bench.projection.work.lowering import LayerKind, Lowered, lower
from moe_bench.projection.work.operations import (
    AttentionCore,
    Gemm,
    LayerWork,
    MemoryBound,
    Number,
    Part,
    Pass,
)
from moe_bench.results import calibration as measured
from moe_bench.results.calibration_tasks import (
    ADAM,
    ADAM_BF16_MOMENTS,
    RESIDUAL,
    RMS_NORM,
    PermutationVariant,
    RouterVariant,
)
from moe_bench.spec.recipe import Recipe

Shape = tuple[measured.Operation, measured.Dtype]

_BF16_BYTES = 2
_ADAM_BYTES: Mapping[str, tuple[int, int]] = {ADAM: (16, 12), ADAM_BF16_MOMENTS: (12, 10)}
"""Read and written per parameter: gradient, weight and both moments; weight and moments, and with moments in
BF16 the BF16 weight too."""
MAX_PARAMS = 2**30
"""Of an optimizer step that is measured: a stream's rate does not change beyond."""


def recipe_shapes(recipe: Recipe, efficiency: Efficiency) -> dict[Shape, float]:
    """Every shape of `recipe` with its share of the time of all, by law, over all layers of the model.

    Shapes are those of one rank. Products in a format that a calibration has no kernel for are measured in
    BF16. Raises BadInputError for what is not projected.
    """
    times_s: dict[Shape, float] = defaultdict(float)
    for work, number, kind in _layers(lower(recipe)):
        for operation in work.operations:
            plain = _priced(operation)
            for shape in _shapes(recipe, operation, kind):
                times_s[shape] += number * efficiency.law_s(plain) if plain is not None else 0.0
    total_s = sum(times_s.values())
    shares = {shape: time_s / total_s for shape, time_s in times_s.items()}
    return shares | {optimizer_shape(recipe): 0.0}


def _layers(lowered: Lowered) -> Iterator[tuple[LayerWork, int, LayerKind | None]]:
    """Kinds of layers with their number in the whole model; the loss last."""
    for kind, work in lowered.kinds.items():
        yield work, sum(chunk.layers.get(kind, 0) for chunk in lowered.chunks), kind
    yield lowered.loss, 1, None


def _priced(operation: object) -> Gemm | AttentionCore | MemoryBound | None:
    """The operation as the law knows it on any GPU: low precisions as BF16, which orders shapes alike."""
    if isinstance(operation, Gemm):
        return replace(operation, number=Number.BF16)
    return operation if isinstance(operation, AttentionCore | MemoryBound) else None


def _shapes(recipe: Recipe, operation: object, kind: LayerKind | None) -> Iterator[Shape]:
    """What to measure for one operation of a layer; nothing for operations that calibrations do not hold."""
    if isinstance(operation, Gemm):
        what = _dense(operation) if operation.num_groups == 1 else _grouped(operation)
        yield what, "bf16"
        if operation.number is not Number.BF16 and not getattr(what, "accumulates_fp32", False):
            yield what, "fp8_e4m3"
    elif isinstance(operation, AttentionCore):
        yield _attention(recipe, operation), "bf16"
    elif isinstance(operation, MemoryBound) and kind is not None:
        found = _memory(recipe, operation)
        if found is not None:
            yield found, "bf16"


def _size(number: float) -> int:
    return max(1, round(number))


def _dense(gemm: Gemm) -> measured.DenseGemm:
    return measured.DenseGemm(
        operation="dense_gemm",
        num_rows=_size(gemm.num_rows),
        num_inner=_size(gemm.num_inner),
        num_columns=_size(gemm.num_columns),
    )


def _grouped(gemm: Gemm) -> measured.GroupedGemm:
    """The inverse of `calibrated_shapes.operations_of`."""
    rows, inner, columns = _size(gemm.num_rows), _size(gemm.num_inner), _size(gemm.num_columns)
    direction: measured.Direction
    match gemm.in_pass:
        case Pass.DGRAD:
            direction, tokens, num_inputs, num_outputs = "dgrad", rows, columns, inner
        case Pass.WGRAD:
            direction, tokens, num_inputs, num_outputs = "wgrad", inner, columns, rows
        case _:
            direction, tokens, num_inputs, num_outputs = "forward", rows, inner, columns
    return measured.GroupedGemm(
        operation="grouped_gemm",
        direction=direction,
        tokens_per_expert=(tokens,) * gemm.num_groups,
        num_inputs=num_inputs,
        num_outputs=num_outputs,
        accumulates_fp32=gemm.accumulates,
    )


def _attention(recipe: Recipe, operation: AttentionCore) -> measured.AttentionCore:
    """On one rank: with context parallelism as many shares of a sequence as the work fills."""
    attention, tensor = recipe.model.attention, recipe.parallel.tensor
    heads = max(1, attention.num_heads // tensor)
    groups = heads if attention.kind == "mla" else max(1, attention.num_query_groups // tensor)
    is_window = operation.seq_len < recipe.seq_len
    context = 1 if is_window else operation.context
    return measured.AttentionCore(
        operation="attention",
        direction="forward" if operation.in_pass in (Pass.FORWARD, Pass.RECOMPUTE) else "backward",
        num_seqs=recipe.micro_batch_size * context,
        seq_len=recipe.seq_len // operation.context,
        num_heads=heads,
        num_query_groups=min(heads, groups),
        qk_head_dim=operation.qk_head_dim,
        v_head_dim=operation.v_head_dim,
        window_tokens=operation.seq_len if is_window else None,
    )


def _memory(recipe: Recipe, operation: MemoryBound) -> measured.MemoryBound | None:
    """The work that the projection counts as these bytes; None for parts that calibrations do not hold.

    Bytes are the projection's own count, so that it finds the measurement again.
    """
    tokens, hidden = token_counts(recipe).sharded, recipe.model.hidden_size
    moved = round(operation.num_bytes)
    is_forward = operation.in_pass in (Pass.FORWARD, Pass.RECOMPUTE)
    moe = recipe.model.moe
    if operation.part is Part.NORMS:
        is_norm = moved == (2 if is_forward else 3) * _BF16_BYTES * tokens * hidden
        if not is_norm and not is_forward:
            return None  # the gradient of a sum is passed on
        variant = RMS_NORM if is_norm else RESIDUAL
        return _memory_bound("norm", variant, (tokens, hidden), moved, is_forward=is_forward)
    if operation.part is Part.ROUTER and moe is not None:
        router = moe.router
        if router.score_function == "sqrt_softplus":
            return None
        chosen = RouterVariant(
            score=router.score_function,
            top_k=moe.top_k,
            num_groups=router.num_groups,
            group_top_k=router.groups_per_token,
        )
        shape = (tokens, moe.num_experts)
        return _memory_bound("router", str(chosen), shape, moved, is_forward=is_forward)
    if operation.part is Part.PERMUTATION and moe is not None:
        is_flex = recipe.dispatch.dispatcher not in ("alltoall", "allgather")
        rows = dispatched_rows(recipe, moe) * recipe.parallel.expert_tensor
        num_local = max(1, moe.num_experts // recipe.parallel.expert)
        variant_of = PermutationVariant(
            top_k=1 if is_flex else moe.top_k,
            is_sorted_again=not is_flex and recipe.parallel.expert > 1 and num_local > 1,
        )
        shape = (rows if is_flex else tokens, recipe.model.expert_hidden_size)
        return _memory_bound("permutation", str(variant_of), shape, moved, is_forward=is_forward)
    return None


def _memory_bound(
    operation: str, variant: str, shape: tuple[int, ...], moved_bytes: int, *, is_forward: bool
) -> measured.MemoryBound:
    """Half of the bytes read and half written, unless a norm or a sum says otherwise."""
    shares = {(RMS_NORM, True): 1 / 2, (RMS_NORM, False): 2 / 3, (RESIDUAL, True): 2 / 3}
    read = round(moved_bytes * shares.get((variant, is_forward), 1 / 2))
    return measured.MemoryBound.model_validate(
        {
            "operation": operation,
            "direction": "forward" if is_forward else "backward",
            "variant": variant,
            "shape": shape,
            "num_read_bytes": read,
            "num_written_bytes": moved_bytes - read,
        }
    )


def optimizer_shape(recipe: Recipe) -> Shape:
    """The optimizer step of the fullest rank, at most MAX_PARAMS of it."""
    optimizer = recipe.optimizer
    is_small = optimizer.exp_avg_dtype != "fp32" or optimizer.exp_avg_sq_dtype != "fp32"
    variant = ADAM_BF16_MOMENTS if is_small else ADAM
    read, written = _ADAM_BYTES[variant]
    num_params = min(MAX_PARAMS, _size(optimizer_bytes(recipe) / (read + written)))
    return (
        measured.MemoryBound(
            operation="optimizer_step",
            variant=variant,
            shape=(num_params,),
            num_read_bytes=read * num_params,
            num_written_bytes=written * num_params,
        ),
        "bf16" if is_small else "fp32",
    )
