"""Layouts as public recipes write them, and every layer in exactly one place."""

import pytest

from moe_bench.projection.search.splits import Split, balanced_counts, layout_text, splits, tail_slots
from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.load import Loader
from moe_bench.spec.pipeline import expand_layout

LOADER = Loader(root=recipes_root(), rules=())
DEEPSEEK = LOADER.recipe(find_recipe("deepseek_v3/h100_sxm_1024g_bf16", LOADER))


@pytest.mark.parametrize(
    ("chunks", "head", "tail", "text"),
    [(32, 1, 2, "Et|(tt|)*30mL"), (16, 0, 3, "Etttt|(tttt|)*14tmL")],
)
def test_deepseek_is_divided_as_public_recipes_divide_it(
    chunks: int, head: int, tail: int, text: str
) -> None:
    counts = balanced_counts(61, chunks, head_slots=head, tail_slots=tail)
    assert counts is not None
    assert layout_text(counts, num_mtp_layers=1) == text


def test_chunks_differ_by_one_slot_at_most_and_hold_every_layer() -> None:
    for num_layers in (1, 7, 48, 61, 94):
        for num_chunks in range(2, 33):
            for head, tail in ((0, 0), (1, 1), (1, 2), (0, 3)):
                counts = balanced_counts(num_layers, num_chunks, head_slots=head, tail_slots=tail)
                if counts is None:
                    continue
                assert sum(counts) == num_layers
                slots = [counts[0] + head, *counts[1:-1], counts[-1] + tail]
                if counts[-1] or tail <= max(slots[:-1]):
                    assert max(slots) - min(slots) <= 1


def test_a_tail_longer_than_a_chunk_stands_alone() -> None:
    assert balanced_counts(8, 5, head_slots=0, tail_slots=4) == (2, 2, 2, 2, 0)


def test_a_chunk_before_the_last_is_never_empty() -> None:
    assert balanced_counts(3, 8, head_slots=0, tail_slots=0) is None
    assert balanced_counts(8, 8, head_slots=1, tail_slots=0) is None


def test_the_text_reads_back_as_the_counts() -> None:
    counts = (7, 8, 8, 9, 9, 9, 0)
    stages = expand_layout(layout_text(counts, num_mtp_layers=2))
    assert [stage.count("t") for stage in stages] == list(counts)
    assert stages[0].startswith("E")
    assert stages[-1] == "mmL"


def test_layers_that_divide_need_no_layout() -> None:
    recipe = LOADER.recipe(find_recipe("qwen3_30b_a3b", LOADER))
    assert Split(4, 1, None) in splits(recipe, (4,))
    assert Split(1, 1, None) in splits(recipe, (1,))


def test_the_tail_of_deepseek_weighs_a_prediction_layer_and_two_heads() -> None:
    # millions of multiplications per token: attention 187 + 84 at 4,096 tokens and nine experts of 44 make a
    # layer of 667; a head is 927, the projection before the prediction layer 103
    assert tail_slots(DEEPSEEK) == round((667 + 103 + 2 * 927) / 667) == 4
    assert tail_slots(DEEPSEEK.model_copy(update={"num_mtp_layers": 0})) == round(927 / 667) == 1
