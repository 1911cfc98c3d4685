"""Published rows made by hand, for the tests of inference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from moe_bench.projection.rows.inference import InferredRun, infer, load_catalogue
from moe_bench.results.published import PublishedRow, load_rows

REPOSITORY = Path(__file__).resolve().parents[2]
ROWS = tuple(row for row in load_rows(REPOSITORY / "results" / "published") if row.is_training)
CATALOGUE = load_catalogue(REPOSITORY / "recipes")
WITHOUT_RECIPES = replace(CATALOGUE, reproducing=lambda row_id: None)


def made_row(**columns: object) -> PublishedRow:
    """A row of Megatron-Bridge 26.04 on 16 H100 that prints its sizes and nothing else."""
    plain: dict[str, object] = {
        "id": "made",
        "kind": "pretrain",
        "model": "Qwen3-30B-A3B",
        "hardware": "H100",
        "num_gpus": 16,
        "precision": "BF16",
        "seq_len": 4096,
        "mbs": 1,
        "gbs": 1024,
        "tp": 1,
        "pp": 1,
        "ep": 8,
        "metrics": {"tokens_per_s_per_gpu": 9000.0},
        "framework": "Megatron-Bridge",
        "version": "NeMo 26.04 (v0.4.0, 2026-04)",
        "source": {"table": "26.04 NeMo Container"},
        "trust": "A",
    }
    return PublishedRow.model_validate({**plain, **columns}, strict=False)


def inferred(**columns: object) -> InferredRun:
    """The run of a made row, which must be projectable."""
    run = infer(made_row(**columns), CATALOGUE)
    assert isinstance(run, InferredRun), run
    return run


def rule_of(run: InferredRun, field: str) -> str:
    """Name of the rule that filled `field`."""
    return next(one.rule for one in run.assumptions if one.field == field)
