"""The registry of published throughput: what others printed, how they ran it, and where it stands."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from moe_bench.results.flops_convention import FlopsConvention
from moe_bench.spec.base import NonNegativeInt, PositiveFloat, PositiveInt, Spec, Text
from moe_bench.spec.load import UnknownNameError, shown, validated
from moe_bench.spec.yaml_tree import Node, read_yaml

Kind = Literal[
    "pretrain",
    "pretrain_functional",
    "lora",
    "layer_microbench",
    "comm_microbench",
    "kernel_microbench",
    "memory",
]
TRAINING_KINDS: tuple[Kind, ...] = ("pretrain", "pretrain_functional")
"""Kinds of row that train a whole model from scratch, so a recipe can reproduce them."""
Trust = Literal["A", "B", "C"]
PublishedPrecision = Literal[
    "BF16", "FP8", "FP8-delayed", "FP8-current-scaling", "FP8-blockwise", "MXFP8", "NVFP4"
]
"""As printed; `FP8` alone means that the source does not say how it scales."""
PublishedDtype = Literal["fp32", "bf16", "fp16"]


class Source(Spec):
    """Where a number is printed; enough to find it again."""

    repo: Text | None = None
    """GitHub repository, `owner/name`."""
    path: Text | None = None
    """File of the repository, or the issue or pull request."""
    commit: Text | None = None
    """Commit or tag that was read."""
    table: Text | None = None
    recipe: Text | None = None
    """Configuration that the source names for the row."""
    bridge_commit: Text | None = None
    """Commit of Megatron-Bridge that the run itself used, where the card states it."""
    paper: Text | None = None
    url: Text | None = None


class Metrics(Spec):
    """Numbers exactly as printed, in the units of the source."""

    tflops_per_gpu: PositiveFloat | None = None
    tflops_per_gpu_range: tuple[PositiveFloat, PositiveFloat] | None = None
    tokens_per_s_per_gpu: PositiveFloat | None = None
    tokens_per_s_total: PositiveFloat | None = None
    """Of the whole cluster, where the source prints that instead."""
    step_time_s: PositiveFloat | None = None
    step_time_s_range: tuple[PositiveFloat, PositiveFloat] | None = None
    mfu_pct: PositiveFloat | None = None
    mfu_peak_tflops: PositiveFloat | None = None
    """Peak that `mfu_pct` is a share of, where it is not the datasheet's."""
    peak_mem_gb: PositiveFloat | None = None
    """GB or GiB, as the source has it; `note` says which where it is known."""
    weights_and_grads_gb: PositiveFloat | None = None
    optimizer_gb: PositiveFloat | None = None
    activations_gb: PositiveFloat | None = None
    total_gb: PositiveFloat | None = None
    gpu_hours_per_trillion_tokens: PositiveFloat | None = None
    total_pretrain_gpu_hours: PositiveFloat | None = None
    moe_layer_fwd_ms: PositiveFloat | None = None
    moe_layer_bwd_ms: PositiveFloat | None = None
    dispatch_us: PositiveFloat | None = None
    combine_us: PositiveFloat | None = None
    sdpa_fwd_tflops: PositiveFloat | None = None
    sdpa_bwd_tflops: PositiveFloat | None = None


class Estimate(Spec):
    """A throughput that needs an assumption about how the source counted FLOPs."""

    tokens_per_s_per_gpu: PositiveFloat
    basis: Literal["tflops", "mfu_full_attention"]
    """`tflops`: printed TFLOPs over Megatron-Core's count. `mfu_full_attention`: printed MFU of 989.5 TFLOPs,
    with attention counted in full."""


class PublishedOptimizer(Spec):
    """What a source says about its optimizer."""

    name: Literal["adam", "adamw", "muon"] | None = None
    implementation: Literal["torch"] | None = None
    precision_aware: bool | None = None
    main_params: PublishedDtype | None = None
    main_grads: PublishedDtype | None = None
    exp_avg: PublishedDtype | None = None
    exp_avg_sq: PublishedDtype | None = None
    clip_grad: bool | None = None


class PublishedRow(Spec):
    """One published measurement; a field is None where the source does not print it."""

    id: Text
    kind: Kind
    model: Text
    num_layers: PositiveInt | None = None
    """Layers, where the row ran a shortened model."""
    hardware: Text | None = None
    num_gpus: PositiveInt | None = None
    precision: PublishedPrecision | None = None
    seq_len: PositiveInt | None = None
    mbs: PositiveInt | None = None
    """Micro batch in Megatron's sense."""
    gbs: PositiveInt | None = None
    ga: PositiveInt | None = None
    """Gradient accumulation steps, where printed."""
    local_batch: PositiveInt | None = None
    """Batch per data-parallel rank in torchtitan's and Automodel's sense."""
    tp: PositiveInt | None = None
    pp: PositiveInt | None = None
    vpp: PositiveInt | None = None
    cp: PositiveInt | None = None
    ep: PositiveInt | None = None
    etp: PositiveInt | None = None
    dp: PositiveInt | None = None
    """Data parallelism, where printed; some sources print the expert one."""
    layout: Text | None = None
    """Megatron-Core's pipeline layout string."""
    pipeline_schedule: (
        Literal["1f1b", "interleaved1f1b", "zero-bubble", "zbv", "v-half", "v-min", "dualpipe"] | None
    ) = None
    sharding: Literal["zero1", "fsdp", "fsdp2"] | None = None
    """`zero1` is Megatron's distributed optimizer; `fsdp` is ZeRO-3 of any make, `fsdp2` torch's."""
    num_shards: PositiveInt | None = None
    method: Literal["FSDP", "FSDP+EP", "TP+EP+DP", "MCore", "Folding"] | None = None
    """Name of the configuration in the comparison of arXiv:2504.14960."""
    dispatcher: Literal["alltoall", "deepep", "hybridep"] | None = None
    dispatcher_sms: PositiveInt | None = None
    permute_fusion: bool | None = None
    experts_backend: Literal["te", "gmm", "torch_mm", "te_mxfp8", "torchao_mxfp8"] | None = None
    ep_overlap: bool | None = None
    delay_wgrad: bool | None = None
    tp_comm_overlap: bool | None = None
    recompute: Literal["none", "selective", "full"] | tuple[Text, ...] | None = None
    """Modules in Megatron-Core's names; `selective` where the source does not say which."""
    recompute_num_layers: PositiveInt | None = None
    cuda_graph: Literal["none", "local", "transformer_engine", "full_iteration"] | None = None
    cuda_graph_modules: tuple[Text, ...] | None = None
    paged_stash: bool | None = None
    offload: Literal["none", "optimizer", "activation_layers", "fine_grained"] | None = None
    offload_num_layers: PositiveInt | None = None
    offload_modules: tuple[Text, ...] | None = None
    mtp: NonNegativeInt | None = None
    force_load_balance: bool | None = None
    token_drop: bool | None = None
    capacity_factor: PositiveFloat | None = None
    optimizer: PublishedOptimizer | None = None
    other: Text | None = None
    metrics: Metrics
    estimate: Estimate | None = None
    flops_convention: FlopsConvention | None = None
    """None on rows that state no FLOPs, such as a kernel's time."""
    framework: Text
    version: Text | None = None
    source: Source
    trust: Trust
    """A: official table or log with the layout. B: official, but a knob is missing, rounded or inferred. C:
    approximate, wrong formula, regression, conflicting, or a user's report."""
    series: Text | None = None
    """Rows of one scaling curve, ablation or release history share it."""
    note: Text | None = None

    @property
    def is_training(self) -> bool:
        """Whether the row trains a whole model, so that a recipe can reproduce it."""
        return self.kind in TRAINING_KINDS

    @property
    def data_parallel(self) -> int | None:
        """GPUs / (TP x PP x CP), a context size that is not printed being 1; None if the rest is unknown."""
        if self.num_gpus is None or self.tp is None or self.pp is None:
            return None
        return self.num_gpus // (self.tp * self.pp * (self.cp or 1))

    @property
    def num_micro_batches(self) -> int | None:
        """GBS / (MBS x DP), rounded to the nearest whole number; None where one is unknown."""
        if self.gbs is None or self.mbs is None or self.data_parallel is None:
            return None
        return round(self.gbs / (self.mbs * self.data_parallel))

    @property
    def tokens_per_step(self) -> int | None:
        """GBS x sequence length."""
        return None if self.gbs is None or self.seq_len is None else self.gbs * self.seq_len

    @property
    def printed_tokens_per_s_per_gpu(self) -> float | None:
        """The printed throughput per GPU: as such, a cluster total, or GPU-hours per trillion tokens."""
        metrics = self.metrics
        if metrics.tokens_per_s_per_gpu is not None:
            return metrics.tokens_per_s_per_gpu
        if metrics.tokens_per_s_total is not None and self.num_gpus is not None:
            return metrics.tokens_per_s_total / self.num_gpus
        if metrics.gpu_hours_per_trillion_tokens is not None:
            return 1e12 / (metrics.gpu_hours_per_trillion_tokens * 3600)
        return None

    @property
    def tokens_per_s_per_gpu_from_step(self) -> float | None:
        """Tokens of a step / (step time x GPUs)."""
        if self.metrics.step_time_s is None or self.tokens_per_step is None or self.num_gpus is None:
            return None
        return self.tokens_per_step / (self.metrics.step_time_s * self.num_gpus)

    @property
    def tokens_per_s_per_gpu(self) -> float | None:
        """Printed, else from the step time; never an estimate. The one figure comparable between suites."""
        return self.printed_tokens_per_s_per_gpu or self.tokens_per_s_per_gpu_from_step

    @property
    def step_time_s(self) -> float | None:
        """Printed, else tokens of a step / (tokens per second and GPU x GPUs)."""
        if self.metrics.step_time_s is not None:
            return self.metrics.step_time_s
        tokens_per_s = self.printed_tokens_per_s_per_gpu
        if tokens_per_s is None or self.tokens_per_step is None or self.num_gpus is None:
            return None
        return self.tokens_per_step / (tokens_per_s * self.num_gpus)

    @property
    def implied_flops_per_token(self) -> float | None:
        """Printed TFLOPs / tokens per second: shows which convention the source really used."""
        if self.metrics.tflops_per_gpu is None or self.tokens_per_s_per_gpu is None:
            return None
        return self.metrics.tflops_per_gpu * 1e12 / self.tokens_per_s_per_gpu

    @property
    def inconsistency_fraction(self) -> float | None:
        """Distance between printed tokens/s and those of the printed step time; None without both."""
        printed, from_step = self.printed_tokens_per_s_per_gpu, self.tokens_per_s_per_gpu_from_step
        if printed is None or from_step is None:
            return None
        return abs(from_step / printed - 1)


class _RowFile(Spec):
    rows: tuple[PublishedRow, ...]


def model_key(name: str) -> str:
    """File stem for a printed name: `Qwen3-30B-A3B` is `qwen3_30b_a3b`; what is in brackets is left out."""
    return re.sub(r"[^a-z0-9]+", "_", name.partition("(")[0].lower()).strip("_")


def load_model_rows(folder: Path, key: str) -> tuple[PublishedRow, ...]:
    """The rows of one model, `key` being its folder name under `recipes/`; empty where nobody published any.

    Raises RecipeError with file, line and key of every mistake.
    """
    path = folder / f"{key}.yaml"
    return _read(path) if path.is_file() else ()


def load_rows(folder: Path) -> tuple[PublishedRow, ...]:
    """Every row below `folder` (`results/published`), file by file."""
    return tuple(row for path in sorted(folder.glob("*.yaml")) for row in _read(path))


def row_by_id(folder: Path, row_id: str) -> PublishedRow:
    """The row called `row_id`, found as by `rows_by_id`."""
    return rows_by_id(folder, (row_id,))[row_id]


def rows_by_id(folder: Path, row_ids: Collection[str]) -> dict[str, PublishedRow]:
    """The rows called `row_ids`; only the files that hold them are parsed.

    Raises UnknownNameError with the nearest ids.
    """
    require_rows(folder, row_ids)
    found: dict[str, PublishedRow] = {}
    for path, ids in _ids_by_file(folder).items():
        if not ids.isdisjoint(row_ids):
            found |= {row.id: row for row in _read(path) if row.id in row_ids}
    return found


def require_rows(folder: Path, row_ids: Collection[str]) -> None:
    """Raise UnknownNameError with the nearest ids where one of `row_ids` is no row's; no file is parsed."""
    known = frozenset[str]().union(*_ids_by_file(folder).values())
    for row_id in row_ids:
        if row_id not in known:
            raise UnknownNameError("published row", row_id, sorted(known))


def _ids_by_file(folder: Path) -> dict[Path, frozenset[str]]:
    return {
        path: frozenset(_ID_LINE.findall(path.read_text(encoding="utf-8")))
        for path in sorted(folder.glob("*.yaml"))
    }


_ID_LINE = re.compile(r"^- id: (\S+)$", flags=re.MULTILINE)


def published_rows(tree: Node) -> tuple[PublishedRow, ...]:
    """The rows of a file in the project's schema; RecipeError names every mistake in it."""
    return validated(tree, _RowFile).rows


def _read(path: Path) -> tuple[PublishedRow, ...]:
    return published_rows(read_yaml(path, shown_as=shown(path)))
