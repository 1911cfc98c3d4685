"""The closed form of memory beside what ran, what was printed and what failed."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from moe_bench.analysis.memory import GIB, pipeline_memory
from moe_bench.analysis.memory_verdict import MemoryVerdict
from moe_bench.projection.accuracy.memory import (
    Evidence,
    JudgedRow,
    MemoryRecord,
    load_evidence,
    memory_record,
)
from moe_bench.projection.rows.inference import Configured, configured
from moe_bench.projection.rows.memory import run_memory
from moe_bench.report.memory_record_view import memory_record_markdown
from moe_bench.results.published import load_rows
from moe_bench.spec.recipe import OptimizerSpec, Recompute
from tests.projection.published_rows import CATALOGUE, REPOSITORY, ROWS, inferred

EVIDENCE = load_evidence(REPOSITORY / "results" / "published" / "known")


@cache
def record() -> MemoryRecord:
    return memory_record(ROWS, EVIDENCE, CATALOGUE)


def failed(part: str) -> JudgedRow:
    return next(row for row in record().failed if part in row.run.row.id)


def test_no_run_that_ran_is_called_impossible() -> None:
    assert [row.run.row.id for row in record().impossible] == []


def test_too_close_to_say_is_said_of_few() -> None:
    assert len(record().ran) > 400
    assert 0 < record().too_close_fraction <= 0.15


def test_no_run_that_failed_is_called_fitting() -> None:
    assert [row.run.row.id for row in record().missed] == []
    assert len(record().failed) == 14


@pytest.mark.parametrize("issue", ["torchtitan-1789", "megatron-bridge-4587", "torchtitan-1993"])
def test_named_failures_are_not_called_fitting(issue: str) -> None:
    assert failed(issue).verdict is not MemoryVerdict.FITS


def test_failures_without_a_layout_or_a_batch_are_named_and_not_judged() -> None:
    assert [(one.row.id, one.reason) for one in record().unjudged] == [
        ("oom-torchtitan-1558-deepseek-v3-671b-h100-512gpu", "unknown layout: no TP"),
        ("oom-automodel-deepseek-v3-gb200-64gpu-lbs4", "no batch"),
    ]


def test_the_one_layout_that_its_thread_names_does_not_fit() -> None:
    # torchtitan #1558 names `671b-pp4-ep8`, which hung; TP and local batch are those of the training file
    unjudged = record().unjudged[0]
    named = unjudged.row.model_copy(update={"tp": 8, "pp": 4, "ep": 8, "local_batch": 4})
    made = configured(named, CATALOGUE)
    assert isinstance(made, Configured)
    assert run_memory(made).verdict is MemoryVerdict.DOES_NOT_FIT


def test_half_the_batch_of_a_failure_fits_as_it_did() -> None:
    # torchtitan #1789: 73.32 GiB reserved with a local batch of 4
    half = configured(failed("torchtitan-1789").run.row.model_copy(update={"local_batch": 4}), CATALOGUE)
    assert isinstance(half, Configured)
    assert run_memory(half).verdict is MemoryVerdict.TOO_CLOSE


def test_printed_peaks_are_met() -> None:
    assert len(record().peaks) == 40
    assert record().num_peaks_met == 40
    assert sum(abs(row.peak_error or 0.0) for row in record().peaks) / 40 < 0.04


@pytest.mark.parametrize(
    ("model", "local_batch", "printed_gib"),
    [("gpt-oss-120b", 1, 83.0), ("gpt-oss-120b", 2, 107.0), ("deepseek-v3", 1, 99.5)],
)
def test_peaks_of_other_local_batches_are_met(model: str, local_batch: int, printed_gib: float) -> None:
    # message of NVIDIA-NeMo/Automodel 77f112399: runs of the same files that no row of the registry has
    row = next(row for row in ROWS if row.id.startswith(f"automodel-yaml-{model}-gb200") and "bf16" in row.id)
    num_steps = (row.gbs or 0) // (row.mbs or 1)
    made = configured(row.model_copy(update={"mbs": local_batch, "gbs": local_batch * num_steps}), CATALOGUE)
    assert isinstance(made, Configured)
    assert run_memory(made).held_bytes / GIB == pytest.approx(printed_gib, rel=0.03)


def test_units_of_printed_peaks_are_those_of_the_source() -> None:
    printed = {row.run.row.id: row.printed_bytes for row in record().peaks}
    automodel = "automodel-yaml-gpt-oss-120b-gb200-32gpu-mxfp8-s4096"
    bridge = "mbskill-nemotron-3-nano-30b-a3b-h100-16gpu-bf16-s8192-selective-moe"
    assert printed[automodel] == round(132.5 * 2**30)
    assert printed[bridge] == 64_653_000_000


def test_corrected_runs_do_not_fit_as_they_are_recorded_and_fit_as_they_ran() -> None:
    corrected = [row for row in record().ran if row.correction is not None]
    assert len(corrected) == sum(len(one.rows) for one in EVIDENCE.corrections if one.ran is not None)
    recorded = {row.id: row for row in ROWS}
    for row in corrected:
        assert row.verdict is MemoryVerdict.FITS
        as_recorded = memory_record(
            [recorded[row.run.row.id]], Evidence(corrections=(), failed=()), CATALOGUE
        ).ran
        is_shown_by_memory = row.correction is not None and row.correction.shown_by == "memory"
        if is_shown_by_memory and "nemotron" not in row.run.row.id:
            assert [one.verdict for one in as_recorded] == [MemoryVerdict.DOES_NOT_FIT]


def test_rows_that_train_no_language_model_are_left_out_by_name() -> None:
    ids = {row.run.row.id for row in record().ran}
    silent = [row_id for one in record().silent for row_id in one.rows]
    assert silent == ["mbcard-func-qwen3.6-35b-a3b-h100-8gpu-bf16-s4096"]
    assert not ids.intersection(silent)


def test_every_named_row_is_in_the_registry() -> None:
    known = {row.id for row in ROWS}
    assert all(row_id in known for one in EVIDENCE.corrections for row_id in one.rows)
    assert not known.intersection(row.id for row in EVIDENCE.failed)


def test_a_printed_breakdown_is_met_part_by_part() -> None:
    # arXiv:2603.07685, DeepSeek-V3 on 256 GPUs, PP4 VPP4 EP64; the fullest rank for states is the second, and
    # its states are those of FP32 gradients and moments
    rows = load_rows(REPOSITORY / "results" / "published")
    row = next(row for row in rows if row.kind == "memory")
    # a batch, and a GPU, which the closed form only compares with
    made = configured(row.model_copy(update={"hardware": "GB200", "tp": 1, "gbs": 4096}), CATALOGUE)
    assert isinstance(made, Configured)
    plain = OptimizerSpec(gradient_dtype="fp32", exp_avg_dtype="fp32", exp_avg_sq_dtype="fp32")
    recipe = made.recipe.model_copy(update={"optimizer": plain, "recompute": Recompute()})
    rank = pipeline_memory(recipe)[1]
    metrics = row.metrics
    assert (rank.weights_bytes + rank.gradients_bytes) / GIB == pytest.approx(
        metrics.weights_and_grads_gb, rel=0.01
    )
    assert rank.optimizer_bytes / GIB == pytest.approx(metrics.optimizer_gb, rel=0.01)
    moving = rank.activations_bytes + rank.transient_bytes
    assert moving / GIB == pytest.approx(metrics.activations_gb, rel=0.1)
    assert rank.total_bytes / GIB == pytest.approx(metrics.total_gb, rel=0.05)


def test_what_is_needed_is_never_less_than_what_is_held() -> None:
    for row in record().ran:
        assert row.memory.held_bytes <= row.memory.reserved_bytes < row.memory.needed_bytes


def test_one_graph_per_iteration_needs_more_at_most() -> None:
    plain, graphed = (inferred(cuda_graph=graph) for graph in ("none", "full_iteration"))
    assert run_memory(plain).held_bytes == run_memory(graphed).held_bytes
    assert run_memory(plain).needed_bytes < run_memory(graphed).needed_bytes


def test_natural_routing_needs_more_at_most() -> None:
    forced, natural = (inferred(force_load_balance=forced) for forced in (True, False))
    assert run_memory(forced).held_bytes == run_memory(natural).held_bytes
    assert run_memory(forced).needed_bytes < run_memory(natural).needed_bytes


def test_a_capacity_without_padding_needs_less_at_least() -> None:
    kept = inferred(force_load_balance=False)
    dropped = inferred(force_load_balance=False, token_drop=True, capacity_factor=1.0)
    assert dropped.recipe.token_drop is not None
    assert not dropped.recipe.token_drop.pad_to_capacity
    assert run_memory(dropped).held_bytes < run_memory(kept).held_bytes


def test_graphs_of_layers_need_more_at_most() -> None:
    plain, graphed = (
        inferred(cuda_graph=graph, cuda_graph_modules=modules)
        for graph, modules in (("none", None), ("transformer_engine", ("attn",)))
    )
    # an input and two gradients of 48 layers, 4,096 tokens of 2,048 channels in BF16
    static = run_memory(graphed).needed_bytes - run_memory(plain).needed_bytes
    assert static == 3 * 48 * 4096 * 2048 * 2


def test_the_documented_table_is_the_record() -> None:
    page = Path(REPOSITORY / "docs" / "memory_accuracy.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- memory: begin -->\n")[2].partition("<!-- memory: end -->")[0]
    assert shown.strip() == memory_record_markdown(record()), (
        "run `python benchmarks/accuracy_table.py --write`"
    )
