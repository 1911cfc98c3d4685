"""Registries in either schema: what the flat one's free text becomes, and where its mistakes are shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_bench.errors import RecipeError
from moe_bench.results.flat_registry import FLAT_COLUMNS, read_registry
from moe_bench.results.published import PublishedRow, load_model_rows

PUBLISHED = Path(__file__).resolve().parents[2] / "results" / "published"

FLAT = """\
- id: one
  kind: pretrain
  model: Qwen3-30B-A3B
  hardware: H100
  num_gpus: 16.0
  precision: FP8 (tile/block-wise)
  seq_len: 4096
  mbs: 1
  gbs: .nan
  dp: null
  fsdp_zero: ZeRO-1 distributed optimizer
  dispatcher: deepep (custom)
  recompute: 'selective: norm, act'
  cuda_graph: transformer_engine scope=['attn', 'moe_router']
  optimizer: 'precision-aware: main_grads bfloat16, exp_avg bfloat16, exp_avg_sq bfloat16'
  other: moe_paged_stash; delay_wgrad; hybridep_sms=32; BSHD
  metrics: {tokens_per_s_per_gpu: 9000, step_time_s: null, tokens_per_s_per_gpu_derived: 1.0}
  derived: {dp: 16, tokens_per_s_per_gpu_est_from_tflops: 8999.5}
  flops_convention: n/a
  framework: Megatron-LM
  version_date: 2025-08
  source: {repo: NVIDIA/Megatron-LM, table: null}
  trust: A
  note: layout Et*3|(tt|)*22L with capacity factor 1.5
"""


def read(folder: Path, text: str) -> tuple[PublishedRow, ...]:
    path = folder / "registry.yaml"
    path.write_text(text, encoding="utf-8")
    return read_registry(path)


def replaced(folder: Path, old: str, new: str) -> PublishedRow:
    assert old in FLAT
    return read(folder, FLAT.replace(old, new))[0]


def test_a_flat_row_becomes_the_same_row_as_one_in_the_schema_of_the_project(tmp_path: Path) -> None:
    ours = """\
rows:
- id: one
  kind: pretrain
  model: Qwen3-30B-A3B
  hardware: H100
  num_gpus: 16
  precision: FP8-blockwise
  seq_len: 4096
  mbs: 1
  sharding: zero1
  dispatcher: deepep
  recompute: [layernorm, moe_act]
  cuda_graph: transformer_engine
  cuda_graph_modules: [attn, moe_router]
  optimizer: {precision_aware: true, main_grads: bf16, exp_avg: bf16, exp_avg_sq: bf16}
  paged_stash: true
  delay_wgrad: true
  dispatcher_sms: 32
  layout: Et*3|(tt|)*22L
  capacity_factor: 1.5
  other: BSHD
  metrics: {tokens_per_s_per_gpu: 9000}
  estimate: {tokens_per_s_per_gpu: 8999.5, basis: tflops}
  framework: Megatron-LM
  version: 2025-08
  source: {repo: NVIDIA/Megatron-LM}
  trust: A
  note: layout Et*3|(tt|)*22L with capacity factor 1.5
"""
    (flat,) = read(tmp_path, FLAT)
    (own,) = read(tmp_path, ours)
    assert flat == own


def test_the_registry_of_the_project_is_read_like_any_other_file() -> None:
    assert read_registry(PUBLISHED / "kimi_k2.yaml") == load_model_rows(PUBLISHED, "kimi_k2")


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("FSDP2 shard=8", ("fsdp2", 8)),
        ("FSDP2 shard 64", ("fsdp2", 64)),
        ("FSDP shard 64", ("fsdp", 64)),
        ("ZeRO-3/FSDP", ("fsdp", None)),
        ("DDP + distributed optimizer (FSDP=0)", ("zero1", None)),
        ("ZeRO-1, 32-way DP", ("zero1", None)),
    ],
)
def test_sharding_in_words_is_understood(
    tmp_path: Path, printed: str, expected: tuple[str, int | None]
) -> None:
    row = replaced(tmp_path, "ZeRO-1 distributed optimizer", printed)
    assert (row.sharding, row.num_shards) == expected


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("full AC", ("full", None)),
        ("full, 5 layers", ("full", 5)),
        ("none (AC off)", ("none", None)),
        ("selective AC", ("selective", None)),
        ("'selective: none (empty module list)'", ("none", None)),
        ("mla_up_proj", (("mla_up_proj",), None)),
        ("moe,layernorm", (("moe", "layernorm"), None)),
        ("RMSNorm and MLA up-projection", (("layernorm", "mla_up_proj"), None)),
    ],
)
def test_recomputation_in_words_is_understood(tmp_path: Path, printed: str, expected: object) -> None:
    row = replaced(tmp_path, "'selective: norm, act'", printed)
    assert (row.recompute, row.recompute_num_layers) == expected


@pytest.mark.parametrize(
    ("remark", "column", "value"),
    [
        ("LBS(local batch)=2; TE + DeepEP", "local_batch", 2),
        ("local batch size 16 per DP rank", "local_batch", 16),
        ("compile + Float8 + AsyncTP, interleaved 1F1B", "pipeline_schedule", "interleaved1f1b"),
        ("pipeline schedule: zbv", "pipeline_schedule", "zbv"),
        ("pipeline schedule: vpp3", "vpp", 3),
        ("method: FSDP+EP", "method", "FSDP+EP"),
        ("capacity factor 1.0", "capacity_factor", 1.0),
        ("experts backend: te mxfp8", "experts_backend", "te_mxfp8"),
        ("num_layers=21", "num_layers", 21),
        ("fallback without permute fusion", "permute_fusion", False),
        ("20 SMs for communication", "dispatcher_sms", 20),
    ],
)
def test_a_remark_that_a_column_holds_is_moved_there(
    tmp_path: Path, remark: str, column: str, value: object
) -> None:
    row = replaced(tmp_path, "moe_paged_stash; delay_wgrad; hybridep_sms=32; BSHD", f"'{remark}'")
    assert getattr(row, column) == value


def test_words_that_are_not_known_stay_in_other_and_leave_the_column_open(tmp_path: Path) -> None:
    row = replaced(tmp_path, "ZeRO-1 distributed optimizer", "sharded somehow")
    assert row.sharding is None
    assert row.other == "BSHD; fsdp_zero: sharded somehow"


def test_a_remark_does_not_override_a_column(tmp_path: Path) -> None:
    row = replaced(tmp_path, "hybridep_sms=32; BSHD", "HybridEP; full CG")
    assert (row.dispatcher, row.cuda_graph) == ("deepep", "transformer_engine")


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("dispatcher:", "dispatchr:", 12, "dispatchr: unknown column; did you mean 'dispatcher'?"),
        ("num_gpus: 16.0", "num_gpus: many", 5, "num_gpus"),
        ("kind: pretrain", "kind: guess", 2, "kind"),
        ("precision: FP8 (tile/block-wise)", "precision: INT8", 6, "precision"),
        ("  trust: A\n", "", 1, "trust"),
    ],
)
def test_a_mistake_names_file_line_and_key(tmp_path: Path, old: str, new: str, line: int, words: str) -> None:
    with pytest.raises(RecipeError, match=r"registry\.yaml") as caught:
        replaced(tmp_path, old, new)
    assert f"registry.yaml:{line}: " in str(caught.value)
    assert words in str(caught.value)


def test_two_rows_of_one_id_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"registry.yaml:25: rows.1.id: one is also the id of row 1"):
        read(tmp_path, FLAT + FLAT)


def test_every_flat_column_is_documented() -> None:
    page = (PUBLISHED.parents[1] / "docs" / "registry.md").read_text(encoding="utf-8")
    section = page.partition("## The flat schema")[2].partition("\n## ")[0]
    assert [column for column in FLAT_COLUMNS if f"`{column}`" not in section] == []
