"""Dense and grouped matrix products as calls to be timed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import grouped_mm

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.calibrate.inputs import DTYPES, FreshBackward, normal
from moe_bench.harness.timing import Call
from moe_bench.results.calibration import DenseGemm, Dtype, GroupedGemm
from moe_bench.results.calibration_tasks import Implementation


def dense_call(what: DenseGemm, dtype: Dtype, implementation: Implementation, device: str) -> Call:
    """[rows, inner] x [inner, columns], the second factor kept [columns, inner] as in linear layers."""
    kind = DTYPES[dtype]
    x = normal(what.num_rows, what.num_inner, dtype=kind, device=device)
    if implementation is Implementation.TE_LINEAR:
        layer = _transformer_engine().Linear(
            what.num_inner, what.num_columns, bias=False, params_dtype=kind, device=device
        )
        return torch.no_grad()(lambda: layer(x))
    weight = normal(what.num_columns, what.num_inner, dtype=kind, device=device).t()
    if implementation is Implementation.MM:
        out = torch.empty(what.num_rows, what.num_columns, dtype=kind, device=device)
        return lambda: torch.mm(x, weight, out=out)
    rows, columns = (what.num_rows, 1), (1, what.num_columns)
    is_tensorwise = implementation is Implementation.SCALED_MM_TENSORWISE
    scale_x = torch.ones(() if is_tensorwise else rows, device=device)
    scale_weight = torch.ones(() if is_tensorwise else columns, device=device)
    return lambda: torch._scaled_mm(
        x, weight, scale_x, scale_weight, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def grouped_call(what: GroupedGemm, dtype: Dtype, implementation: Implementation, device: str) -> Call:
    """The products of all experts, in the layouts of `kernels/grouped_linear.py`."""
    if implementation is Implementation.TE_GROUPED_LINEAR:
        return _te_grouped_call(what, DTYPES[dtype], device)
    sizes = torch.tensor(what.tokens_per_expert, device=device)
    offsets = sizes.cumsum(0, dtype=torch.int32)
    if implementation is Implementation.SCALED_GROUPED_MM:
        return _scaled_grouped_call(what, DTYPES[dtype], offsets, device)
    kind, num_experts = DTYPES[dtype], len(what.tokens_per_expert)
    num_tokens, inputs, outputs = sum(what.tokens_per_expert), what.num_inputs, what.num_outputs
    x = normal(num_tokens, outputs if what.direction == "dgrad" else inputs, dtype=kind, device=device)
    if what.direction == "wgrad":
        gradient = normal(num_tokens, outputs, dtype=kind, device=device)
        if not what.accumulates_fp32:
            return lambda: grouped_mm(gradient.t(), x, offs=offsets)
        main = torch.zeros(num_experts, outputs, inputs, device=device)
        return lambda: main.add_(grouped_mm(gradient.t(), x, offs=offsets))
    weight = normal(num_experts, outputs, inputs, dtype=kind, device=device)
    if what.direction == "forward":
        weight = weight.transpose(1, 2)
    return lambda: grouped_mm(x, weight, offs=offsets)


def _scaled_grouped_call(what: GroupedGemm, kind: torch.dtype, offsets: Tensor, device: str) -> Call:
    """Scales of rows of the first factor and of columns of the second; both contiguous along the sum."""
    if what.direction == "wgrad":
        raise MissingRequirementError(
            "wgrad in FP8: no recipe asks for one that is not added to FP32; see BF16"
        )
    scaled_grouped_mm = getattr(functional, "scaled_grouped_mm", None)
    if scaled_grouped_mm is None:
        raise MissingRequirementError(
            f"torch {torch.__version__} has no torch.nn.functional.scaled_grouped_mm; use 2.11 or later"
        )
    row_wise = functional.ScalingType.RowWise
    is_forward = what.direction == "forward"
    inner, columns = what.num_inputs, what.num_outputs
    if not is_forward:
        inner, columns = columns, inner
    num_tokens, num_experts = sum(what.tokens_per_expert), len(what.tokens_per_expert)
    x = normal(num_tokens, inner, dtype=kind, device=device)
    weight = normal(num_experts, columns, inner, dtype=kind, device=device).transpose(1, 2)
    scale_x = torch.ones(num_tokens, device=device)
    scale_weight = torch.ones(num_experts, columns, device=device)
    return lambda: scaled_grouped_mm(
        x,
        weight,
        scale_x,
        row_wise,
        scale_weight,
        row_wise,
        offs=offsets,
        output_dtype=torch.bfloat16,
        use_fast_accum=is_forward,
    )


def _te_grouped_call(what: GroupedGemm, kind: torch.dtype, device: str) -> Call:
    """Transformer Engine's module; one of its two gradients is taken by freezing the other side."""
    layer = _transformer_engine().GroupedLinear(
        len(what.tokens_per_expert),
        what.num_inputs,
        what.num_outputs,
        bias=False,
        params_dtype=kind,
        fuse_wgrad_accumulation=what.accumulates_fp32,
        device=device,
    )
    splits = list(what.tokens_per_expert)
    x = normal(sum(splits), what.num_inputs, dtype=kind, device=device)
    if what.direction == "forward":
        return torch.no_grad()(lambda: layer(x, splits))
    x.requires_grad_(what.direction == "dgrad")
    weights = list(layer.parameters())
    for weight in weights:
        weight.requires_grad_(what.direction == "wgrad")
        if what.accumulates_fp32:
            weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    return FreshBackward(lambda: layer(x, splits), [x] if what.direction == "dgrad" else weights)


def _transformer_engine() -> Any:
    """Loads TE's torch modules, which the caller has found to be installed."""
    import transformer_engine.pytorch as te

    return te
