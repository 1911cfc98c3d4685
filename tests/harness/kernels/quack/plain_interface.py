"""quack.gemm_interface of quack-kernels 0.6.5 in plain torch: the same signatures, what is used of them.

Layouts follow the package: `concat_layout` names tensors whose dimension without unit stride is [gate; up],
which the product sees as pairs (gemm_interface.py, _concat_interleave; gemm_sm90.py:581). Shapes and strides
that the kernels refuse are refused (gemm.py:745).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def gemm(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    bias: Tensor | None = None,
    alpha: float | Tensor = 1.0,
    out_dtype: Any = None,
    out_quant_dim: int = -1,
    out_transposed: bool = False,
    out_per_tensor_scale: float | Tensor | None = None,
    cu_seqlens_m: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    A_idx: Tensor | None = None,
    batch_idx_permute: Tensor | None = None,
    dynamic_scheduler: bool = False,
    tuned: bool = True,
    rounding_mode: int = 0,
    sr_seed: int | Tensor = 0,
    concat_layout: tuple[str, ...] | None = None,
    split_k: int | None = 1,
    split_k_mode: int = 0,
) -> Tensor:
    """A @ B by groups of rows (m) or of the contracted dimension (k)."""
    concat_layout = concat_layout or ()
    if cu_seqlens_m is not None:
        product = _by_rows(A, B, cu_seqlens_m, A_idx, "B" in concat_layout)
        return product if out is None else out.copy_(product)
    assert cu_seqlens_k is not None
    product = _by_contraction(A, B, cu_seqlens_k, A_idx)
    if out is None:
        return product
    return out.copy_(_in_halves(product, out) if "out" in concat_layout else product)


def gemm_gated(
    A: Tensor,
    B: Tensor,
    C: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    alpha: float | Tensor = 1.0,
    preact_out: Tensor | None = None,
    postact_out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    postact_dtype: torch.dtype | None = None,
    cu_seqlens_m: Tensor | None = None,
    A_idx: Tensor | None = None,
    store_preact: bool = True,
    dynamic_scheduler: bool = False,
    tuned: bool = True,
    config: Any = None,
    concat_layout: tuple[str, ...] | None = None,
    split_k: int | None = 1,
    split_k_mode: int = 0,
) -> tuple[Tensor, Tensor]:
    """A @ B in pairs of gate and up, and silu(gate) * up."""
    assert activation == "swiglu"
    assert cu_seqlens_m is not None
    pairs = _by_rows(A, B, cu_seqlens_m, A_idx, "B" in (concat_layout or ()))
    return pairs, functional.silu(pairs[:, ::2]) * pairs[:, 1::2]


def gemm_dgated(
    A: Tensor,
    B: Tensor,
    PreAct: Tensor,
    activation: str | None = None,
    dx_out: Tensor | None = None,
    postact_out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    postact_dtype: torch.dtype | None = None,
    colvec_scale: Tensor | None = None,
    colvec_reduce: bool = False,
    cu_seqlens_m: Tensor | None = None,
    A_idx: Tensor | None = None,
    dynamic_scheduler: bool = True,
    tuned: bool = True,
    config: Any = None,
    split_k: int | None = 1,
    split_k_mode: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """dout = A @ B; scaled, the pairs' gradient and silu(gate) * up; unscaled, the sum of dout times that."""
    assert activation == "swiglu"
    assert colvec_reduce
    assert cu_seqlens_m is not None
    assert colvec_scale is not None
    grad = _by_rows(A, B, cu_seqlens_m, A_idx, False)
    gate, up = PreAct[:, ::2], PreAct[:, 1::2]
    sigmoid = torch.sigmoid(gate)
    activated = gate * sigmoid * up
    scale = colvec_scale.to(grad.dtype).unsqueeze(-1)
    grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    pairs = torch.stack([grad_gate, grad * gate * sigmoid], dim=-1).flatten(1)
    return pairs * scale, activated * scale, (grad * activated).sum(dim=-1, dtype=torch.float32)


def gemm_add_inplace(
    A: Tensor,
    B: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 1.0,
    cu_seqlens_m: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    A_idx: Tensor | None = None,
    batch_idx_permute: Tensor | None = None,
    dynamic_scheduler: bool = False,
    tuned: bool = True,
    concat_layout: tuple[str, ...] | None = None,
    split_k: int | None = 1,
    split_k_mode: int = 0,
) -> None:
    """Out += A @ B by groups of the contracted dimension."""
    assert cu_seqlens_k is not None
    product = _by_contraction(A, B, cu_seqlens_k, A_idx)
    out.add_(_in_halves(product, out) if "out" in (concat_layout or ()) else product)


def _by_rows(A: Tensor, B: Tensor, starts: Tensor, index: Tensor | None, has_halves: bool) -> Tensor:
    assert A.stride(-1) == 1 or not A.numel(), "varlen_m requires A to be k-major"
    _check_index(starts, index)
    weights = _in_pairs(B) if has_halves else B
    rows = A if index is None else A.index_select(0, index)
    assert starts[-1] == rows.shape[0]
    groups = zip(starts[:-1].tolist(), starts[1:].tolist(), weights, strict=True)
    return torch.cat([rows[start:end] @ weight for start, end, weight in groups])


def _by_contraction(A: Tensor, B: Tensor, starts: Tensor, index: Tensor | None) -> Tensor:
    assert A.stride(-2) == 1, "varlen_k requires A to be m-major"
    assert B.stride(-1) == 1, "varlen_k requires B to be n-major"
    assert B.numel(), "a kernel over no rows"
    _check_index(starts, index)
    rows = A if index is None else A.index_select(1, index)
    assert starts[-1] == rows.shape[1] == B.shape[0]
    groups = zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
    return torch.stack([rows[:, start:end] @ B[start:end] for start, end in groups])


def _in_pairs(halves: Tensor) -> Tensor:
    """[gate; up] as gate 0, up 0, gate 1, ... along the matrix dimension that is not contiguous."""
    dim = _strided_dim(halves)
    gate, up = halves.movedim(dim, -1).chunk(2, dim=-1)
    return torch.stack([gate, up], dim=-1).flatten(-2).movedim(-1, dim)


def _in_halves(pairs: Tensor, out: Tensor) -> Tensor:
    """The pairs of a product as `out` stores them, in halves of its dimension that is not contiguous."""
    columns = pairs.movedim(_strided_dim(out), -1)
    return torch.cat([columns[..., ::2], columns[..., 1::2]], dim=-1).movedim(-1, _strided_dim(out))


def _strided_dim(tensor: Tensor) -> int:
    return -2 if tensor.stride(-1) == 1 else -1


def _check_index(starts: Tensor, index: Tensor | None) -> None:
    assert starts.dtype == torch.int32
    assert index is None or (index.dtype == torch.int32 and index.is_contiguous())
