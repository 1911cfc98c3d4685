"""Fits the laws of projection/evidence/rates.py to public measurements: constants and errors of each.

    pip install moe_bench[prior]
    python benchmarks/fit_rates.py
    python benchmarks/fit_rates.py --simumax configs/system/b200_bf16_ceperm.json

The file of the second form is MooreThreads/SimuMax's (Apache-2.0), Transformer Engine's products on a B200.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from moe_bench.projection.evidence.rates import GEMM_HBM_FRACTION, KERNEL_START_S, gpu_rates
from moe_bench.projection.evidence.tables import (
    FOLDERS,
    AttentionTable,
    Column,
    ExpertTable,
    GemmTable,
    package_version,
    read_attention_table,
    read_expert_tables,
    read_gemm_tables,
    read_latent_attention_table,
)
from moe_bench.projection.work.operations import Number
from moe_bench.results.published import load_model_rows
from moe_bench.spec.catalogue import recipes_root
from moe_bench.spec.load import Loader
from moe_bench.spec.system import GpuSpec

MIN_SIZE, MAX_SIZE = 512, 32768
"""Rows, columns and inner size of the products that are fitted: those of training, and no larger."""
MIN_FLOPS = 2e11
"""Attention below this does not fill a GPU."""
OUTLIER_LOG_ERROR = 0.1
TERA, MICRO = 1e12, 1e-6
LARGE_SIZE = 1024
MIN_TOKENS, MIN_ROWS = 64, 1024
"""Tokens per expert and rows of a rank below which no layer of training lies."""
PUBLISHED = Path(__file__).parent.parent / "results" / "published"
LATENT = 160
"""Mean of the head dimensions 192 and 128."""

ERRORS = ("shapes", "med %", "p90 %", "bias %")

Law = Callable[[Column], Column]


def main() -> None:
    """Print one Markdown table per law."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--simumax", type=Path)
    options = parser.parse_args()
    print(f"aiconfigurator-core {package_version()}\n")
    gpus = measured_gpus()
    print_gemms(gpus)
    print_long_products(gpus)
    print_experts(gpus)
    print_attention(gpus)
    print_published_attention()
    if options.simumax is not None:
        print_grouped(options.simumax, next(gpu for gpu in gpus if gpu.device_name == "NVIDIA B200"))


def measured_gpus() -> list[GpuSpec]:
    """GPUs of our systems that have tables."""
    loader = Loader(root=recipes_root(), rules=())
    systems = [loader.system(path.stem) for path in sorted((recipes_root() / "systems").glob("*.yaml"))]
    return [system.gpu for system in systems if system.gpu is not None and system.gpu.device_name in FOLDERS]


def fitted(law: Law, start: Sequence[float], measured_s: Column) -> tuple[Column, Column]:
    """Constants that minimise a soft absolute log error, and the relative errors that remain."""
    solution = least_squares(
        lambda logarithms: np.log(law(np.exp(logarithms)) / measured_s),
        np.log(start),
        loss="soft_l1",
        f_scale=OUTLIER_LOG_ERROR,
    )
    constants = np.exp(solution.x)
    return constants, law(constants) / measured_s - 1


def print_head(*titles: str) -> None:
    """Of a Markdown table."""
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")


def shown(errors: Column) -> str:
    """Number of shapes, median and 90th percentile of the absolute error, and the median error."""
    absolute = np.abs(errors)
    return (
        f"{len(errors)} | {100 * np.median(absolute):.1f} | {100 * np.quantile(absolute, 0.9):.1f} "
        f"| {100 * np.median(errors):+.1f}"
    )


def print_gemms(gpus: Sequence[GpuSpec]) -> None:
    """Linear layers of TensorRT-LLM: limit, share of HBM bandwidth, and the quantization beside them."""
    print_head("GPU", "format", "limit TFLOP/s", "HBM share", "quantize TB/s", "start us", *ERRORS)
    for gpu in gpus:
        for number, table in read_gemm_tables(gpu.device_name, engine="trtllm").items():
            constants, errors = fit_gemm(gpu, number, of_training(table))
            limit, share, quantize, start = constants
            print(
                f"| {gpu.device_name} | {number} | {limit / TERA:.0f} | {share:.2f} | {quantize} "
                f"| {start / MICRO:.1f} | {shown(errors)} |"
            )
    print()


def print_long_products(gpus: Sequence[GpuSpec]) -> None:
    """Median rate of BF16 products by their work: the longest ones outlast the burst of the clock."""
    edges = (1e11, 1e12, 5e12, 2e13, 1e14, 1e16)
    print_head("GPU, bf16, TFLOP/s", *(f"{low:.0e} to {high:.0e}" for low, high in pairwise(edges)))
    for gpu in gpus:
        table = read_gemm_tables(gpu.device_name, engine="trtllm")[Number.BF16]
        sizes = np.stack([table.num_rows, table.num_inner, table.num_columns])
        flops = 2 * sizes.prod(0)
        rates = flops / table.time_s / TERA
        is_large = sizes.min(0) >= LARGE_SIZE
        cells = [
            f"{np.median(rates[is_large & (flops >= low) & (flops < high)]):.0f}"
            for low, high in pairwise(edges)
        ]
        print(f"| {gpu.device_name} | {' | '.join(cells)} |")
    print()


def print_experts(gpus: Sequence[GpuSpec]) -> None:
    """Fused MoE layers of TensorRT-LLM by the law of its linear layers, with what surrounds the products."""
    print_head("GPU", "format", "HBM share", "row TB/s", "start us", "us per expert", *ERRORS)
    for gpu in gpus:
        rates = gpu_rates(gpu).gemm
        for number, table in read_expert_tables(gpu.device_name, engine="trtllm").items():
            if number is Number.NVFP4:  # several kernels, chosen by size
                continue
            constants, errors = fit_experts(gpu, number, rates[number].limit_flops_per_s, table)
            cells = " | ".join(f"{value:.2f}" for value in constants)
            print(f"| {gpu.device_name} | {number} | {cells} | {shown(errors)} |")
    print()


def fit_experts(gpu: GpuSpec, number: Number, limit: float, table: ExpertTable) -> tuple[Column, Column]:
    """Share of HBM bandwidth, rate of permutation, activation and quantization, start, start per expert."""
    chosen = (table.num_rows / table.num_local >= MIN_TOKENS) & (table.num_rows >= MIN_ROWS)
    rows, local, tokens = table.num_rows[chosen], table.num_local[chosen], table.num_tokens[chosen]
    hidden, ffn = table.hidden[chosen], table.expert_ffn[chosen]
    element = number.element_bytes
    up_bytes = element * (rows * hidden + 2 * local * hidden * ffn) + 4 * rows * ffn
    down_bytes = element * (rows * ffn + local * hidden * ffn) + 2 * rows * hidden
    around = rows * (hidden * (4 + element) + ffn * (4 + element)) + 4 * tokens * hidden

    def law(constants: Column) -> Column:
        share, row_rate, start, per_expert = constants
        bandwidth = share * gpu.hbm_bytes_per_s
        up_s = np.hypot(4 * rows * hidden * ffn / limit, up_bytes / bandwidth)
        down_s = np.hypot(2 * rows * hidden * ffn / limit, down_bytes / bandwidth)
        return up_s + down_s + around / (row_rate * TERA) + (start + 2 * local * per_expert) * MICRO

    return fitted(law, [0.8, gpu.hbm_bytes_per_s / TERA / 2, 20.0, 0.1], table.time_s[chosen])


def of_training(table: GemmTable) -> GemmTable:
    """The shapes that are fitted."""
    sizes = np.stack([table.num_rows, table.num_inner, table.num_columns])
    chosen = (sizes.min(0) >= MIN_SIZE) & (sizes.max(0) <= MAX_SIZE)
    return GemmTable(
        num_rows=table.num_rows[chosen],
        num_inner=table.num_inner[chosen],
        num_columns=table.num_columns[chosen],
        time_s=table.time_s[chosen],
    )


def fit_gemm(
    gpu: GpuSpec, number: Number, table: GemmTable
) -> tuple[tuple[float, float, str, float], Column]:
    """BF16: one constant, share and start as stated; low precision: share, quantization and start as well."""
    rows, inner, columns = table.num_rows, table.num_inner, table.num_columns
    flops = 2 * rows * inner * columns
    num_bytes = number.element_bytes * (rows + columns) * inner + 2 * rows * columns
    bandwidth = gpu.hbm_bytes_per_s

    if number is Number.BF16:

        def product(constants: Column) -> Column:
            memory_s = num_bytes / (GEMM_HBM_FRACTION * bandwidth)
            return np.hypot(flops / (constants[0] * TERA), memory_s) + KERNEL_START_S

        (limit,), errors = fitted(product, [gpu.bf16_flops_per_s / TERA], table.time_s)
        return (limit * TERA, GEMM_HBM_FRACTION, "", KERNEL_START_S), errors

    quantized_bytes = (2 + number.element_bytes) * rows * inner

    def quantized_product(constants: Column) -> Column:
        limit, share, quantize, start = constants
        product_s = np.hypot(flops / (limit * TERA), num_bytes / (share * bandwidth))
        return product_s + quantized_bytes / (quantize * TERA) + start * MICRO

    (limit, share, quantize, start), errors = fitted(
        quantized_product, [gpu.fp8_flops_per_s / TERA, 0.7, bandwidth / TERA / 2, 5.0], table.time_s
    )
    return (limit * TERA, share, f"{quantize:.2f}", start * MICRO), errors


def print_attention(gpus: Sequence[GpuSpec]) -> None:
    """vLLM's kernels by head dimension, and TensorRT-LLM's with the head dimensions of DeepSeek-V3."""
    print_head("GPU", "engine", "head dim", "limit TFLOP/s", "half tokens", "start us", *ERRORS)
    for gpu in gpus:
        for engine, table in (
            ("vllm", read_attention_table(gpu.device_name, engine="vllm")),
            ("trtllm", read_latent_attention_table(gpu.device_name, engine="trtllm")),
        ):
            if table is not None:
                print_attention_of(gpu, engine, table)
    print()


def print_attention_of(gpu: GpuSpec, engine: str, table: AttentionTable) -> None:
    """One line per head dimension."""
    for dim in (64, 128, LATENT, 256):
        chosen = (table.head_dim == dim) & (table.window_tokens == 0)
        chosen &= (table.num_flops > MIN_FLOPS) & (table.seq_len >= 1024)
        if not chosen.any():
            continue
        flops, tokens = table.num_flops[chosen], table.seq_len[chosen]

        def law(constants: Column, flops: Column = flops, tokens: Column = tokens) -> Column:
            limit, half, start = constants
            return flops / (limit * TERA) * (1 + half / tokens) + start * MICRO

        (limit, half, start), errors = fitted(law, [600.0, 900.0, 20.0], table.time_s[chosen])
        kernel = f"{gpu.device_name} | {engine} | {dim}"
        print(f"| {kernel} | {limit:.0f} | {half:.0f} | {start:.0f} | {shown(errors)} |")


def print_published_attention() -> None:
    """The law through the two lengths that arXiv:2603.07685 prints for each architecture and direction."""
    rows = load_model_rows(PUBLISHED, "deepseek_v3_attention")
    print_head("cuDNN, 192 and 128", "direction", "limit TFLOP/s", "half tokens")
    for hardware in ("Hopper", "Blackwell"):
        short, long = sorted(
            (row for row in rows if row.hardware == hardware), key=lambda row: row.seq_len or 0
        )
        for direction in ("fwd", "bwd"):
            rates = [
                (getattr(row.metrics, f"sdpa_{direction}_tflops"), row.seq_len or 0) for row in (short, long)
            ]
            limit, half = through(*rates)
            print(f"| {hardware} | {direction} | {limit:.0f} | {half:.0f} |")
    print()


def through(short: tuple[float, int], long: tuple[float, int]) -> tuple[float, float]:
    """limit and half of rate(n) = limit / (1 + half / n) through two (rate, n)."""
    (rate, tokens), (long_rate, long_tokens) = short, long
    half_over_limit = (1 / rate - 1 / long_rate) / (1 / tokens - 1 / long_tokens)
    limit = 1 / (1 / rate - half_over_limit / tokens)
    return limit, half_over_limit * limit


def print_grouped(path: Path, gpu: GpuSpec) -> None:
    """Transformer Engine's dense and grouped products by pass: limit, share and start per group."""
    operations = json.loads(path.read_text(encoding="utf-8"))["accelerator"]["op"]
    print_head("B200, Transformer Engine", "limit TFLOP/s", "HBM share", "us per group", *ERRORS)
    for kind, stages in (
        ("matmul", {"forward": "layout=TN", "dgrad": "layout=NN", "wgrad": "layout=NT"}),
        (
            "group_matmul",
            {"forward": "stage=fwd", "dgrad": "stage=bwd_grad_act", "wgrad": "stage=bwd_grad_w"},
        ),
    ):
        peak = operations[kind]["tflops"] * TERA
        for in_pass, marker in stages.items():
            rows = [
                simumax_row(key, fraction, peak)
                for key, fraction in operations[kind]["accurate_efficient_factor"].items()
                if marker in key
            ]
            flops, num_bytes, groups, measured_s = np.array(rows).T

            def law(
                constants: Column,
                flops: Column = flops,
                num_bytes: Column = num_bytes,
                groups: Column = groups,
            ) -> Column:
                limit, share, start = constants
                product_s = np.hypot(flops / (limit * TERA), num_bytes / (share * gpu.hbm_bytes_per_s))
                return product_s + KERNEL_START_S + (groups > 1) * groups * start * MICRO

            (limit, share, start), errors = fitted(law, [1100.0, 0.75, 2.0], measured_s)
            per_group = f"{start:.1f}" if groups.max() > 1 else ""
            print(f"| {kind}, {in_pass} | {limit:.0f} | {share:.2f} | {per_group} | {shown(errors)} |")


def simumax_row(key: str, fraction: float, peak_flops_per_s: float) -> tuple[float, float, float, float]:
    """FLOPs, bytes, groups and seconds of one entry, as `ng=8, M=..., N=..., K=..., main_grad_dtype=fp32`."""
    entry = dict(field.split("=") for field in key.split(", "))
    groups = int(entry.get("ng", 1))
    rows, columns, inner = (int(entry.get(name.upper(), 0) or entry[name]) for name in "mnk")
    product = {"dgrad": rows * inner, "wgrad": inner * columns}
    is_wgrad = entry.get("stage") == "bwd_grad_w"
    if entry.get("stage") == "bwd_grad_act":
        factors, written = (rows * columns, columns * inner), product["dgrad"]
    elif is_wgrad:
        factors, written = (rows * columns, rows * inner), product["wgrad"]
    else:
        factors, written = (rows * inner, inner * columns), rows * columns
    gradient = entry.get("main_grad_dtype", entry["out_dtype"]) if is_wgrad else entry["out_dtype"]
    accesses = 2 if entry["accumulate"] == "True" else 1
    element = 4 if gradient == "fp32" else 2
    num_bytes = groups * (2 * sum(factors) + accesses * element * written)
    flops = 2 * groups * rows * columns * inner
    return flops, num_bytes, groups, flops / (fraction * peak_flops_per_s)


if __name__ == "__main__":
    main()
