"""What the host is counted for, held against runs that others matched."""

from __future__ import annotations

from moe_bench.projection.rows.inference import InferredRun, infer
from moe_bench.projection.step import project
from moe_bench.spec.recipe import CudaGraphs, Recipe
from tests.projection.published_rows import CATALOGUE, made_row


def gpt_oss_20b(graphs: CudaGraphs) -> Recipe:
    """Two micro batches of one sequence on 16 H100, as launches alone decide them."""
    row = made_row(model="GPT-OSS-20B", tp=2, pp=4, ep=4, gbs=4)
    run = infer(row, CATALOGUE)
    assert isinstance(run, InferredRun)
    return run.recipe.model_copy(update={"cuda_graphs": graphs})


def test_graphs_of_parts_gain_what_megatron_bridge_measured_with_all_else_equal() -> None:
    """0.467 to 0.520 s without, 0.391 to 0.399 s with them (skills/nemo-mbridge-perf-cuda-graphs/card.yaml at
    Megatron-Bridge 067f987df03b).
    """
    parts = CudaGraphs(implementation="transformer_engine", modules=("attn", "moe_router", "moe_preprocess"))
    eager, graphed = project(gpt_oss_20b(CudaGraphs())).step_s, project(gpt_oss_20b(parts)).step_s
    assert 0.467 / 0.399 < eager / graphed < 0.520 / 0.391
