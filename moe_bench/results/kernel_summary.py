"""Kernels of a profiled step by name: calls, time, share and kind, as a CSV beside the trace."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_KINDS: tuple[tuple[str, str], ...] = (
    ("communication", r"nccl|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|deep_?ep|hybrid_?ep|c10d"),
    ("attention", r"attention|flash|fmha|sdpa|cudnn_generated_fort_native"),
    ("grouped GEMM", r"grouped_?(mm|gemm)|group(ed)?_?gemm|gemm.*(grouped|ptr_array)|GroupProblemShape"),
    (
        "GEMM",
        r"gemm|cutlass|nvjet|\bxmma|wgmma|cublas|aten::(add)?(mm|bmm|matmul|linear)$|aten::(add|b)mm_?$",
    ),
    ("quantization", r"quantiz|cast_transpose|fp8|amax|scale_inv"),
    ("optimizer", r"adam|multi_tensor|l2norm|_foreach"),
    (
        "routing and permutation",
        r"permut|top_?k|rout|sort|scatter|gather|index|histogram|cumsum|masked_select",
    ),
    ("norm", r"norm"),
    ("loss and softmax", r"softmax|cross_entropy|log_prob"),
    ("copies and fills", r"memcpy|memset|copy_|fill_|zero_|aten::(_to_copy|copy|clone|contiguous|cat|empty)"),
    ("views", r"aten::(view|as_strided|slice|select|expand|transpose|t$|to$|split|unsqueeze|detach|resolve)"),
    ("elementwise", r"elementwise|vectorized|silu|swiglu|sigmoid|mul|add|div|reduce|triton|aten::"),
)
"""Kind and what its kernels' names contain; the first that matches."""
OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelLine:
    """All calls of one kernel over the profiled steps, on the device or, without a GPU, on the host."""

    name: str
    kind: str
    num_calls: int
    total_s: float
    time_fraction: float
    """Of the sum over all kernels."""


def kernel_kind(name: str) -> str:
    """What a kernel does, by its name."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name, re.IGNORECASE)), OTHER)


def kernel_lines(calls: Iterable[tuple[str, int, float]]) -> tuple[KernelLine, ...]:
    """Lines from (name, calls, total seconds), the longest first; kernels that took no time are left out."""
    taken = [(name, num_calls, total_s) for name, num_calls, total_s in calls if total_s > 0]
    whole_s = sum(total_s for _, _, total_s in taken)
    lines = (
        KernelLine(
            name=name,
            kind=kernel_kind(name),
            num_calls=num_calls,
            total_s=total_s,
            time_fraction=total_s / whole_s,
        )
        for name, num_calls, total_s in taken
    )
    return tuple(sorted(lines, key=lambda line: -line.total_s))


def write_kernels(path: Path, lines: Iterable[KernelLine]) -> None:
    """The lines as CSV, times in milliseconds."""
    with path.open("x", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("kind", "kernel", "calls", "total_ms", "mean_us", "percent"))
        for line in lines:
            writer.writerow(
                (
                    line.kind,
                    line.name,
                    line.num_calls,
                    f"{line.total_s * 1e3:.4f}",
                    f"{line.total_s / line.num_calls * 1e6:.2f}",
                    f"{line.time_fraction * 100:.2f}",
                )
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PartLine:
    """All ranges of one name over the profiled steps, with what runs inside them."""

    name: str
    """`MoE layer fwd`, `attention bwd`."""
    num_calls: int
    total_s: float


def write_parts(path: Path, lines: Iterable[PartLine]) -> None:
    """The lines as CSV, times in milliseconds."""
    with path.open("x", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("part", "calls", "total_ms", "mean_us"))
        for line in lines:
            mean_us = line.total_s / line.num_calls * 1e6
            writer.writerow((line.name, line.num_calls, f"{line.total_s * 1e3:.4f}", f"{mean_us:.2f}"))
