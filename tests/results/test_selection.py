"""Rows are chosen by the names that sources print and by those that recipes use."""

import pytest

from moe_bench.results.published import TRAINING_KINDS, PublishedRow
from moe_bench.results.selection import Selection, selected
from moe_bench.spec.load import UnknownNameError

Rows = dict[str, PublishedRow]


@pytest.mark.parametrize(
    ("ours", "printed"),
    [
        (Selection(model="deepseek_v3"), Selection(model="DeepSeek-V3")),
        (Selection(system="h100_sxm"), Selection(system="H100")),
        (Selection(precision="fp8_blockwise"), Selection(precision="FP8-blockwise")),
    ],
)
def test_a_recipes_name_and_a_printed_name_choose_the_same_rows(
    ours: Selection, printed: Selection, rows: Rows
) -> None:
    assert selected(rows.values(), ours) == selected(rows.values(), printed) != ()


def test_training_rows_are_meant_unless_another_kind_is_asked_for(rows: Rows) -> None:
    assert {row.kind for row in selected(rows.values(), Selection())} == set(TRAINING_KINDS)
    assert len(selected(rows.values(), Selection(kind="all"))) == len(rows)
    assert {row.kind for row in selected(rows.values(), Selection(kind="lora"))} == {"lora"}


def test_filters_add_up(rows: Rows) -> None:
    asked = Selection(model="deepseek_v3", system="H100", precision="bf16", num_gpus=256, trust="a")
    assert [row.id for row in selected(rows.values(), asked)] == [
        "automodel-deepseek-v3-h100-256gpu-bf16-s4096"
    ]


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        (Selection(model="deepseek_v33"), "deepseek_v3"),
        (Selection(system="H1000"), "h100"),
        (Selection(precision="mxfp88"), "mxfp8"),
        (Selection(kind="pretraining"), "pretrain"),
    ],
)
def test_a_name_that_no_row_has_offers_the_nearest(asked: Selection, near: str, rows: Rows) -> None:
    with pytest.raises(UnknownNameError, match=f"did you mean.*'{near}'"):
        selected(rows.values(), asked)
