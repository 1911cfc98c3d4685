"""The registry: every row is read, stands in its model's file, names its source, and agrees with itself."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from moe_bench.errors import RecipeError
from moe_bench.results.flops_convention import CONVENTIONS, FlopsConvention
from moe_bench.results.published import (
    Estimate,
    Metrics,
    PublishedOptimizer,
    PublishedRow,
    Source,
    load_model_rows,
    load_rows,
    model_key,
    row_by_id,
)
from moe_bench.spec.load import UnknownNameError

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "results" / "published"
ROWS = load_rows(FOLDER)

TWICE_AS_FAST_BY_STEP_TIME = "mbcard-nemotron-3-super-120b-a12b-gb200-64gpu-bf16-s8192"
"""The card's tokens/s is half of what its own step time and batch give; the row is graded C for that."""

IMPLIED_GFLOP_PER_TOKEN = {
    # model at 4,096 tokens -> Megatron's count, without MTP unless the row trains it
    "DeepSeek-V3": 260.0,
    "Qwen3-235B-A22B": 148.0,
    "Qwen3-30B-A3B": 23.0,
    "Kimi-K2": 204.5,
}


def test_the_registry_holds_566_rows_with_distinct_ids() -> None:
    assert len(ROWS) == 566
    assert [row_id for row_id, times in Counter(row.id for row in ROWS).items() if times > 1] == []


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_row_stands_in_the_file_of_its_model(path: Path) -> None:
    assert {model_key(row.model) for row in load_model_rows(FOLDER, path.stem)} == {path.stem}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_says_what_it_is(path: Path) -> None:
    head = path.read_text().partition("rows:")[0]
    assert head.startswith("# Published measurements of ")
    assert "docs/registry.md" in head


def test_every_row_names_a_source_that_can_be_found_again() -> None:
    assert [row.id for row in ROWS if not (row.source.repo or row.source.paper or row.source.url)] == []


def test_every_training_row_has_a_number() -> None:
    def has_number(row: PublishedRow) -> bool:
        metrics = row.metrics
        numbers = (row.tokens_per_s_per_gpu, row.step_time_s, metrics.tflops_per_gpu, metrics.mfu_pct)
        ranges = (metrics.tflops_per_gpu_range, metrics.step_time_s_range)
        return any(number is not None for number in (*numbers, *ranges))

    assert [row.id for row in ROWS if row.is_training and not has_number(row)] == []


def test_a_row_of_automodel_matches_hand_arithmetic() -> None:
    row = row_by_id(FOLDER, "automodel-deepseek-v3-h100-256gpu-bf16-s4096")
    assert row.data_parallel == 64  # 256 GPUs / (TP1 x PP4)
    assert row.num_micro_batches == 8  # 512 / (1 x 64)
    assert row.tokens_per_step == 2_097_152  # 512 x 4096
    assert row.tokens_per_s_per_gpu_from_step == pytest.approx(1001.5, abs=0.05)  # 2,097,152 / (8.18 x 256)
    assert row.tokens_per_s_per_gpu == 1002  # printed figures come first
    assert row.implied_flops_per_token == pytest.approx(249.5e9, rel=1e-4)  # 250e12 / 1002


def test_gpu_hours_per_trillion_tokens_become_tokens_per_second() -> None:
    row = row_by_id(FOLDER, "deepseek-report-deepseek-v3-h800-2048gpu-fp8-tile-block-wise-s4096")
    assert row.tokens_per_s_per_gpu == pytest.approx(1543.2, abs=0.05)  # 1e12 / (180,000 x 3,600)


def test_printed_tokens_and_step_time_agree_except_where_the_card_contradicts_itself() -> None:
    apart = [row.id for row in ROWS if (row.inconsistency_fraction or 0) > 0.01]
    assert apart == [TWICE_AS_FAST_BY_STEP_TIME]


def test_rows_counted_by_megatron_imply_its_flops_per_token() -> None:
    """An outside truth: printed TFLOPs over printed tokens/s is the count, within the rounding of both."""
    apart = {
        row.id: row.implied_flops_per_token
        for row in ROWS
        if row.flops_convention is FlopsConvention.MCORE
        and row.kind == "pretrain"
        and row.trust == "A"
        and row.seq_len == 4096
        and row.model in IMPLIED_GFLOP_PER_TOKEN
        and row.implied_flops_per_token is not None
        and abs(row.implied_flops_per_token / 1e9 / IMPLIED_GFLOP_PER_TOKEN[row.model] - 1) > 0.01
    }
    assert apart == {}


def test_the_batch_of_every_row_divides_among_its_ranks() -> None:
    def divides(row: PublishedRow) -> bool:
        if row.gbs is None or row.mbs is None or row.data_parallel is None:
            return True
        return row.gbs % (row.mbs * row.data_parallel) == 0

    assert [row.id for row in ROWS if not divides(row)] == []


def test_notes_are_written_for_readers_outside() -> None:
    inside = re.compile(r"find_string|read_file|not fetched|/work\b|\bour own notes\b")
    texts = {row.id: f"{row.note} {row.other} {row.source}" for row in ROWS}
    assert [row_id for row_id, text in texts.items() if inside.search(text)] == []


def test_an_unknown_id_offers_the_nearest_ones() -> None:
    with pytest.raises(UnknownNameError, match="automodel-deepseek-v3-h100-256gpu-bf16-s4096"):
        row_by_id(FOLDER, "automodel-deepseek-v3-h100-256gpu-bf16-s4069")


def test_a_model_that_nobody_published_has_no_rows() -> None:
    assert load_model_rows(FOLDER, "no_such_model") == ()


def test_a_mistyped_column_is_refused_with_its_place(tmp_path: Path) -> None:
    text = (FOLDER / "olmoe_1b_7b.yaml").read_text().replace("  hardware: H100", "  hardwear: H100", 1)
    line = text.splitlines().index("  hardwear: H100") + 1
    (tmp_path / "olmoe_1b_7b.yaml").write_text(text)
    with pytest.raises(RecipeError) as raised:
        load_rows(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}/olmoe_1b_7b.yaml:{line}: rows.0.hardwear: unknown key")
    assert "did you mean 'hardware'?" in str(raised.value)


def test_every_convention_is_explained_and_used() -> None:
    assert set(CONVENTIONS) == set(FlopsConvention)
    assert {row.flops_convention for row in ROWS} - {None} == set(FlopsConvention)


def test_the_documentation_names_every_column_and_convention() -> None:
    text = (REPOSITORY / "docs" / "registry.md").read_text()
    names = [
        *(
            name
            for kind in (PublishedRow, Metrics, Estimate, PublishedOptimizer, Source)
            for name in kind.model_fields
        ),
        *(convention.value for convention in FlopsConvention),
    ]
    assert [name for name in names if f"`{name}`" not in text] == []
