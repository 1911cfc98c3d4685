"""The six products of the experts on quack-kernels, in Megatron-Core's weight layout, with gathered rows.

    up          [E, 2 F, H]: gate rows first, then the linear ones
    down        [E, H, F]

quack's gated epilogues pair each gate with its linear part in neighbouring columns. `concat_layout` makes it
read a weight's halves, and write its gradient's, as such pairs, so nothing is copied or stored otherwise; the
pre-activation and its gradient stand in pairs, [rows, 2 F], and never leave these functions' callers. Read in
quack-kernels 0.6.5, quack/gemm_interface.py; the calls are those of SonicMoE (Dao-AILab/sonic-moe).

Where every micro batch has as many rows, quack measures its kernels at the first call (`tuned`) and keeps the
fastest on disk; it does so for every new number of rows, so elsewhere its default for the GPU runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe_bench.harness.kernels.quack.rows import ExpertRows

ACTIVATION = "swiglu"
HALVES_OF_B, HALVES_OF_OUT = ("B",), ("out",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradient:
    """Where the gradient of a weight goes, in the weight's layout."""

    tensor: Tensor
    accumulates: bool
    """Whether it is added to what is there."""


def interface() -> Any:
    """quack's products `gemm`, `gemm_gated`, `gemm_dgated`, `gemm_add_inplace`; it takes seconds to load."""
    from quack import gemm_interface

    return gemm_interface


def up(x: Tensor, weight: Tensor, rows: ExpertRows) -> tuple[Tensor, Tensor]:
    """Gathered rows of x [tokens, H] projected: pre-activation [rows, 2 F] in pairs, activated [rows, F]."""
    return interface().gemm_gated(
        x,
        weight.mT,
        activation=ACTIVATION,
        cu_seqlens_m=rows.starts,
        A_idx=rows.token_of_row,
        dynamic_scheduler=False,
        tuned=rows.is_static,
        concat_layout=HALVES_OF_B,
    )


def down(activated: Tensor, weight: Tensor, rows: ExpertRows) -> Tensor:
    """activated [rows, F] projected back: [rows, H], not yet weighted."""
    return interface().gemm(
        activated, weight.mT, cu_seqlens_m=rows.starts, dynamic_scheduler=False, tuned=rows.is_static
    )


def down_gradient(
    grad: Tensor, weight: Tensor, pre_activation: Tensor, probabilities: Tensor, rows: ExpertRows
) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradient of the tokens' weighted sums, [tokens, H], gathered, back through the activation.

    Returns:
        The gradient of the pre-activation [rows, 2 F] in pairs; the activated rows [rows, F], made again and
        weighted, for the weight's gradient; and the gradient of the probabilities, FP32 [rows].
    """
    return interface().gemm_dgated(
        grad,
        weight,
        pre_activation,
        activation=ACTIVATION,
        colvec_scale=probabilities,
        colvec_reduce=True,
        cu_seqlens_m=rows.starts,
        A_idx=rows.token_of_row,
        dynamic_scheduler=False,
        tuned=rows.is_static,
    )


def down_weight_gradient(grad: Tensor, weighted: Tensor, rows: ExpertRows, into: Gradient) -> None:
    """grad [tokens, H] gathered and transposed, times weighted [rows, F], expert by expert: [E, H, F]."""
    _weight_gradient(grad, weighted, rows, into, into.tensor)


def up_input_gradient(grad_pre: Tensor, weight: Tensor, rows: ExpertRows) -> Tensor:
    """grad_pre [rows, 2 F] in pairs, projected back: [rows, H], of which a token has K."""
    return interface().gemm(
        grad_pre,
        weight,
        cu_seqlens_m=rows.starts,
        dynamic_scheduler=False,
        tuned=rows.is_static,
        concat_layout=HALVES_OF_B,
    )


def up_weight_gradient(x: Tensor, grad_pre: Tensor, rows: ExpertRows, into: Gradient) -> None:
    """x [tokens, H] gathered and transposed, times grad_pre [rows, 2 F] in pairs, as halves: [E, 2 F, H]."""
    _weight_gradient(x, grad_pre, rows, into, into.tensor.mT, concat_layout=HALVES_OF_OUT)


def _weight_gradient(
    gathered: Tensor, beside: Tensor, rows: ExpertRows, into: Gradient, view: Tensor, **options: Any
) -> None:
    """Write through `view`; an expert without rows gets zeros, or nothing added."""
    if rows.num_rows == 0:
        # quack would start a kernel on no rows, whose operand has no address.
        if not into.accumulates:
            into.tensor.zero_()
        return
    options |= {
        "cu_seqlens_k": rows.starts,
        "A_idx": rows.token_of_row,
        "dynamic_scheduler": False,
    }
    if into.accumulates:
        # Not tuned: where memory is short, quack's tuner measures on the operands themselves
        # (quack/autotuner.py), which would add the gradient many times.
        interface().gemm_add_inplace(gathered.t(), beside, view, tuned=False, **options)
    else:
        interface().gemm(gathered.t(), beside, out=view, tuned=rows.is_static, **options)
