"""Public measurements of single kernels: the tables of `aiconfigurator-core`, where that is installed.

    pip install moe_bench[prior]

NVIDIA Corporation, Apache-2.0: times of linear layers, attention and MoE kernels of three inference engines
on one GPU. They say nothing about gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from moe_bench.errors import MissingRequirementError
from moe_bench.projection.work.operations import Number

PACKAGE = "aiconfigurator-core"
_MODULE = "aiconfigurator_core"

FOLDERS: Mapping[str, str] = MappingProxyType(
    {
        "NVIDIA H100 80GB HBM3": "h100_sxm",
        "NVIDIA H200": "h200_sxm",
        "NVIDIA B200": "b200_sxm",
        "NVIDIA GB200": "gb200",
        "NVIDIA GB300": "gb300",
    }
)
"""Folder of a GPU's tables by its device name."""

ENGINES: Mapping[str, str] = MappingProxyType({"trtllm": "1.3.0rc20", "vllm": "0.24.0", "sglang": "0.5.14"})
"""Version of each engine that the tables hold for all of these GPUs."""

NUMBERS: Mapping[str, Number] = MappingProxyType(
    {
        "bfloat16": Number.BF16,
        "fp8": Number.FP8_TENSORWISE,
        "fp8_block": Number.FP8_BLOCKWISE,
        "nvfp4": Number.NVFP4,
    }
)

Column = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmTable:
    """Linear layers of one number format, [m, k] x [k, n]; one time per shape."""

    num_rows: Column
    num_inner: Column
    num_columns: Column
    time_s: Column
    """With the quantization of the [m, k] factor where the format is not BF16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionTable:
    """Causal attention over whole sequences, BF16, forward."""

    num_seqs: Column
    seq_len: Column
    num_heads: Column
    num_query_groups: Column
    head_dim: Column
    window_tokens: Column
    """0 for none."""
    time_s: Column

    @property
    def mean_keys(self) -> Column:
        """Keys that a query sees on average: (n + 1) / 2 of a triangle, less in a band."""
        window = np.where(self.window_tokens > 0, np.minimum(self.window_tokens, self.seq_len), self.seq_len)
        pairs: Column = window * (window + 1) / 2 + (self.seq_len - window) * window
        return pairs / self.seq_len

    @property
    def num_flops(self) -> Column:
        """Scores and weighted sum of what the mask leaves."""
        queries: Column = self.num_seqs * self.num_heads * self.seq_len
        return queries * self.mean_keys * 4 * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTable:
    """Gated MoE layers in one fused call, forward, balanced and without tensor parallelism: permutation, both
    products, activation, unpermutation.
    """

    num_tokens: Column
    num_rows: Column
    """Of all local experts together."""
    num_local: Column
    hidden: Column
    expert_ffn: Column
    time_s: Column


def package_version() -> str:
    """Of the installed tables; MissingRequirementError where there are none."""
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise MissingRequirementError(
            f"{PACKAGE} is not installed: pip install moe_bench[prior], or project from the laws"
        ) from error


def read_gemm_tables(device_name: str, *, engine: str) -> dict[Number, GemmTable]:
    """Linear layers of `engine` on a GPU, by number format; empty for a GPU without tables."""
    columns = _read(device_name, "gemm", engine, "gemm_perf", ("gemm_dtype", "m", "k", "n", "latency"))
    if columns is None:
        return {}
    rows, inner, outer, milliseconds = (_floats(columns, name) for name in ("m", "k", "n", "latency"))
    tables = {}
    for name, number in NUMBERS.items():
        chosen = columns["gemm_dtype"] == name
        if chosen.any():
            tables[number] = GemmTable(
                num_rows=rows[chosen],
                num_inner=inner[chosen],
                num_columns=outer[chosen],
                time_s=milliseconds[chosen] / 1e3,
            )
    return tables


def read_attention_table(device_name: str, *, engine: str) -> AttentionTable | None:
    """Whole-sequence attention of `engine` on a GPU; None for a GPU without tables."""
    names = ("batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim", "window_size", "latency")
    types = ("attn_dtype", "kv_cache_dtype", "step")
    columns = _read(device_name, "attention", engine, "context_attention_perf", (*names, *types))
    if columns is None:
        return None
    is_bf16 = (columns["attn_dtype"] == "bfloat16") & (columns["kv_cache_dtype"] == "bfloat16")
    chosen = is_bf16 & (columns["step"].astype(np.int64) == 0)
    seqs, tokens, heads, groups, dims, window, milliseconds = (
        _floats(columns, name)[chosen] for name in names
    )
    return AttentionTable(
        num_seqs=seqs,
        seq_len=tokens,
        num_heads=heads,
        num_query_groups=groups,
        head_dim=dims,
        window_tokens=window,
        time_s=milliseconds / 1e3,
    )


def read_latent_attention_table(device_name: str, *, engine: str) -> AttentionTable | None:
    """The same with head dimensions 192 and 128, whose mean is given; None for a GPU without tables."""
    names = ("batch_size", "isl", "num_heads", "latency")
    types = ("mla_dtype", "kv_cache_dtype")
    columns = _read(device_name, "mla", engine, "context_mla_perf", (*names, *types))
    if columns is None:
        return None
    chosen = (columns["mla_dtype"] == "bfloat16") & (columns["kv_cache_dtype"] == "bfloat16")
    seqs, tokens, heads, milliseconds = (_floats(columns, name)[chosen] for name in names)
    return AttentionTable(
        num_seqs=seqs,
        seq_len=tokens,
        num_heads=heads,
        num_query_groups=heads,
        head_dim=np.full_like(seqs, 160.0),
        window_tokens=np.zeros_like(seqs),
        time_s=milliseconds / 1e3,
    )


def read_expert_tables(device_name: str, *, engine: str) -> dict[Number, ExpertTable]:
    """MoE layers of `engine` on a GPU, by number format; empty for a GPU without tables."""
    sizes = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")
    types = ("moe_dtype", "kernel_source", "distribution")
    columns = _read(device_name, "moe", engine, "moe_perf", (*sizes, *types, "latency"))
    if columns is None:
        return {}
    tokens, hidden, ffn, top_k, experts, tensor, expert_ranks = (_floats(columns, name) for name in sizes)
    gated = np.array(["nongated" not in str(name) for name in columns["kernel_source"]])
    is_used = (columns["distribution"] == "balanced") & (tensor == 1) & gated
    tables = {}
    for name, number in NUMBERS.items():
        chosen = is_used & (columns["moe_dtype"] == name)
        if chosen.any():
            tables[number] = ExpertTable(
                num_tokens=tokens[chosen],
                num_rows=(tokens * top_k / expert_ranks)[chosen],
                num_local=(experts / expert_ranks)[chosen],
                hidden=hidden[chosen],
                expert_ffn=ffn[chosen],
                time_s=_floats(columns, "latency")[chosen] / 1e3,
            )
    return tables


def _read(
    device_name: str, operation: str, engine: str, name: str, columns: tuple[str, ...]
) -> Mapping[str, npt.NDArray[np.generic]] | None:
    package_version()
    gpu, spec = FOLDERS.get(device_name), util.find_spec(_MODULE)
    if gpu is None or spec is None or not spec.submodule_search_locations:
        return None
    data = Path(spec.submodule_search_locations[0]) / "systems" / "data"
    path = data / gpu / operation / engine / ENGINES[engine] / f"{name}.parquet"
    if not path.is_file():
        raise MissingRequirementError(
            f"{path}: not in {PACKAGE} {package_version()}, whose engines have other versions; "
            f"install {PACKAGE}==0.12.0"
        )
    from pyarrow import parquet

    table = parquet.read_table(path, columns=list(columns))
    return {column: table[column].to_numpy() for column in columns}


def _floats(columns: Mapping[str, npt.NDArray[np.generic]], name: str) -> Column:
    return columns[name].astype(np.float64)
