"""Floating-point operations of torch's matrix products, from the shapes that they are called with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, NamedTuple

import torch


class FlopKind(StrEnum):
    """Kinds of operators that multiply matrices."""

    MM = "mm"
    BMM = "bmm"
    GROUPED = "grouped GEMM"
    GROUPED_FP8 = "grouped GEMM in FP8"
    ATTENTION = "attention"


class FlopFormula(NamedTuple):
    """The kind of an operator, and its operations from arguments and output."""

    kind: FlopKind
    num_flops: Callable[[tuple[Any, ...], Any], int]


@functools.cache
def flop_formulas() -> Mapping[Any, FlopFormula]:
    """Formulas by operator. A product of m x k and k x n is 2 m k n operations; what is added does not count.

    A grouped GEMM cuts one dimension into groups that add up to it, so its count does not depend on them:
    tokens [t, k] times experts [e, k, n] are 2 t k n, and a weight gradient [m, t] times [t, n] is 2 t m n.
    torch's own FlopCounterMode has no formula for it and counts 0.
    """
    aten = torch.ops.aten
    return {
        aten.mm.default: FlopFormula(FlopKind.MM, lambda args, output: _product(args[0], args[1])),
        aten.addmm.default: FlopFormula(FlopKind.MM, lambda args, output: _product(args[1], args[2])),
        aten.mm.out: FlopFormula(FlopKind.MM, lambda args, output: _product(args[0], args[1])),
        aten.bmm.default: FlopFormula(FlopKind.BMM, lambda args, output: _product(args[0], args[1])),
        aten.baddbmm.default: FlopFormula(FlopKind.BMM, lambda args, output: _product(args[1], args[2])),
        aten._grouped_mm.default: FlopFormula(
            FlopKind.GROUPED, lambda args, output: _product(args[0], args[1])
        ),
        aten._scaled_grouped_mm_v2.default: FlopFormula(
            FlopKind.GROUPED_FP8, lambda args, output: _product(args[0], args[1])
        ),
    }


def _product(left: torch.Tensor, right: torch.Tensor) -> int:
    """2 x the elements of the left factor x the columns of the right one."""
    return 2 * left.numel() * right.shape[-1]
