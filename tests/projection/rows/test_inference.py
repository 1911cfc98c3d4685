"""Rows become recipes: how many, by which rules, and what happens to the rest."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from moe_bench.projection.rows.inference import InferredRun, NotProjectable, infer
from moe_bench.projection.rows.rules import RECIPE_RULE, RULES
from moe_bench.results.row_recipe import KNOBS, disagreements
from moe_bench.spec.pipeline import pipeline_chunks
from tests.projection.published_rows import CATALOGUE, ROWS, WITHOUT_RECIPES, inferred, made_row, rule_of

OUTCOMES = [infer(row, CATALOGUE) for row in ROWS]
RUNS = [outcome for outcome in OUTCOMES if isinstance(outcome, InferredRun)]
FULL_LAYOUT = [
    outcome
    for outcome in OUTCOMES
    if outcome.row.kind == "pretrain"
    and None not in (outcome.row.tp, outcome.row.pp, outcome.row.num_gpus)
    and None not in (outcome.row.seq_len, outcome.row.gbs)
]


def test_nearly_every_row_with_a_full_layout_is_inferred() -> None:
    lost = [outcome for outcome in FULL_LAYOUT if isinstance(outcome, NotProjectable)]
    assert len(FULL_LAYOUT) == 406
    assert len(lost) / len(FULL_LAYOUT) <= 0.1


def test_every_row_that_is_not_projectable_says_why() -> None:
    reasons = {
        outcome.reason.partition(" facts")[0].partition(" file")[0].partition(":")[0]
        for outcome in OUTCOMES
        if isinstance(outcome, NotProjectable)
    }
    assert reasons == {
        "no architecture",
        "no system",
        "no throughput",
        "unknown layout",
        "no number of GPUs",
        "no sequence length",
        "no micro batch",
    }


def test_every_rule_fires_on_a_published_row() -> None:
    fired = Counter((one.field, one.rule) for run in RUNS for one in run.assumptions)
    assert [rule.name for rule in RULES if not fired[rule.field, rule.name]] == []


def test_every_assumption_names_its_rule_or_the_recipe() -> None:
    names = {(rule.field, rule.name) for rule in RULES}
    assert [
        (run.row.id, one)
        for run in RUNS
        for one in run.assumptions
        if one.rule != RECIPE_RULE and (one.field, one.rule) not in names
    ] == []


NOT_COPIED = {
    "layout": "its letters are repeated without brackets",
    "framework": "recipes run on Megatron-Core",
    "experts_backend": "experts of another engine",
    "optimizer.implementation": "an optimizer of another engine",
    "tp_comm_overlap": "nothing to overlap at TP1",
    "num_shards": "follows from the layout",
    "pipeline_schedule": "on `stack` where a recipe has no word for it",
    "cuda_graph": "the older spelling of full_iteration; `mamba`",
    "cuda_graph_modules": "`mamba`",
    "recompute": "modules of other models",
    "vpp": "printed at PP1 by some tables",
    "offload": "modules without names",
    "optimizer.clip_grad": "not asked for",
    "model": "two names of one shape",
    "hardware": "another memory of one GPU",
}
"""Columns in which an inferred recipe may differ from its row, and why."""


def test_what_a_row_prints_is_in_its_recipe() -> None:
    # Megatron-FSDP stands for torch's
    expected = "sharding: the row has fsdp2, the recipe fsdp"
    assert [
        (run.row.id, str(one))
        for run in RUNS
        for one in disagreements(run.row, run.recipe)
        if one.column not in NOT_COPIED and str(one) != expected
    ] == []


def test_columns_that_may_differ_are_columns() -> None:
    assert set(NOT_COPIED) <= {knob.column for knob in KNOBS}


def test_the_layers_of_every_inferred_run_stand_somewhere() -> None:
    for run in RUNS:
        recipe = run.recipe
        num_layers = recipe.model.num_layers
        chunks = pipeline_chunks(recipe.parallel, num_layers=num_layers, num_mtp_layers=recipe.num_mtp_layers)
        per_chunk = [len(chunk.layers) for chunk in chunks]
        assert sum(per_chunk) == num_layers, run.row.id
        assert recipe.num_micro_batches >= 1, run.row.id
        # the first and the last stage make room for embedding, MTP and loss
        assert all(abs(count - num_layers / len(per_chunk)) < 2 for count in per_chunk[1:-1]), run.row.id


def test_a_recipe_that_reproduces_the_row_fills_what_no_release_does() -> None:
    row_id = "mb26.04.01-qwen3-30b-a3b-h100-16gpu-fp8-current-scaling-s4096"
    (run,) = (run for run in RUNS if run.row.id == row_id)
    assert rule_of(run, "kernels.fusions") == RECIPE_RULE
    # the recipe captures graphs, the workload configuration of v0.4.1 does not
    assert rule_of(run, "cuda_graphs") == "no CUDA graphs in Bridge's configuration"
    assert run.recipe.cuda_graphs.implementation == "none"
    assert run.recipe.dispatch.num_sms == 32


AGREED = (
    "dispatch.dispatcher",
    "token_drop.capacity_factor",
    "routing.mode",
    "parallel.expert_tensor",
    "parallel.virtual_pipeline",
    "micro_batch_size",
    "num_mtp_layers",
    "optimizer.exp_avg_dtype",
    "kernels.op_fuser",
)


@pytest.mark.parametrize("field", AGREED)
def test_rules_give_what_recipes_say_of_the_same_row(field: str) -> None:
    """The 50 recipes that copy a row were read from public recipe code: an outside truth for the rules."""
    differing = []
    for row in ROWS:
        recipe = CATALOGUE.reproducing(row.id)
        run = infer(row, WITHOUT_RECIPES)
        if recipe is None or isinstance(run, NotProjectable):
            continue
        if field.rpartition(".")[2] in {difference.field for difference in recipe.differences}:
            continue
        ours, theirs = _value(run.recipe, field), _value(recipe, field)
        if ours != theirs:
            differing.append((row.id, ours, theirs))
    assert differing == []


def _value(tree: object, field: str) -> object:
    for name in field.split("."):
        tree = None if tree is None else getattr(tree, name)
    return tree


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"kind": "lora"}, "no training of a whole model from scratch"),
        ({"model": "Nobody-1B"}, "no architecture facts of Nobody-1B"),
        ({"hardware": "MI355X"}, "no system file of MI355X"),
        ({"hardware": None}, "no system file of None"),
        ({"metrics": {}}, "no throughput"),
        ({"tp": None}, "unknown layout: no TP"),
        ({"ep": None}, "unknown layout: no EP"),
        ({"seq_len": None}, "no sequence length"),
        ({"num_gpus": None}, "no number of GPUs"),
        ({"precision": None}, "no precision"),
        ({"gbs": None}, "no batch"),
        ({"mbs": None, "framework": "HAI-LLM"}, "no micro batch"),
    ],
)
def test_a_row_without_what_it_takes_is_refused(columns: dict[str, object], reason: str) -> None:
    outcome = infer(made_row(**columns), CATALOGUE)
    assert isinstance(outcome, NotProjectable)
    assert outcome.reason == reason


def test_the_step_time_follows_from_tokens_and_batch() -> None:
    run = inferred()
    # 1024 sequences x 4096 tokens over 16 GPUs at 9000 tokens/s each
    assert run.step_time_s == pytest.approx(1024 * 4096 / 16 / 9000)


def test_the_page_shows_the_rules_of_the_code() -> None:
    from moe_bench.projection.rows.rules import rule_table

    page = (Path(__file__).resolve().parents[3] / "docs" / "row_inference.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- rules: begin -->\n")[2].partition("<!-- rules: end -->")[0]
    assert shown.strip() == rule_table(), "write rule_table() between the marks of docs/row_inference.md"
