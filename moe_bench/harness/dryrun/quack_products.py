"""quack's products without data: they allocate what the kernels write, and count 2 m n k of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_bench.harness.dryrun.operator_flops import FlopKind
from moe_bench.harness.dryrun.stand_in_kernels import OnFlops


class QuackProducts:
    """What `moe_bench.harness.kernels.quack.products` calls of `quack.gemm_interface`."""

    def __init__(self, on_flops: OnFlops) -> None:
        self._on_flops = on_flops

    def gemm(self, a: Tensor, b: Tensor, out: Tensor | None = None, **options: Any) -> Tensor:
        """[rows, k] times [experts, k, n]; or, over varying k, [m, tokens] gathered, times [rows, n]."""
        if out is None:
            out = a.new_empty(self._rows(a, options), b.shape[-1])
            self._count(out.shape[0], a.shape[1], b.shape[-1])
        else:
            self._count(b.shape[0], a.shape[0], b.shape[1])
        return out

    def gemm_add_inplace(self, a: Tensor, b: Tensor, out: Tensor, **options: Any) -> None:
        """The same over varying k, added to `out`."""
        self._count(b.shape[0], a.shape[0], b.shape[1])

    def gemm_gated(self, a: Tensor, b: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """[rows, n] before the activation, and [rows, n / 2] behind it."""
        num_rows = self._rows(a, options)
        self._count(num_rows, a.shape[1], b.shape[-1])
        return a.new_empty(num_rows, b.shape[-1]), a.new_empty(num_rows, b.shape[-1] // 2)

    def gemm_dgated(
        self, a: Tensor, b: Tensor, pre_activation: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient before the activation, activated rows again, FP32 gradient of the probabilities."""
        num_rows = pre_activation.shape[0]
        self._count(num_rows, a.shape[1], b.shape[-1])
        sums = a.new_empty(num_rows, dtype=torch.float32)
        return torch.empty_like(pre_activation), a.new_empty(num_rows, b.shape[-1]), sums

    def _rows(self, a: Tensor, options: dict[str, Any]) -> int:
        index = options.get("A_idx")
        return int(a.shape[0] if index is None else index.shape[0])

    def _count(self, rows: int, k: int, n: int) -> None:
        self._on_flops(FlopKind.GROUPED, 2 * rows * k * n)
