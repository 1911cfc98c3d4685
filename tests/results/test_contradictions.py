"""Rows that contradict themselves: planted ones are found, and every one in the registry is explained."""

from pathlib import Path

import pytest

from moe_bench.errors import RecipeError
from moe_bench.results.contradictions import Check, Contradiction, Known, contradictions, load_known
from moe_bench.results.published import PublishedRow, model_key
from moe_bench.spec.recipe import Recipe
from tests.results.conftest import PUBLISHED

KNOWN = load_known(PUBLISHED / "known" / "contradictions.yaml")
SOUND = "automodel-deepseek-v3-h100-256gpu-bf16-s4096"
BATCH_OF_A_LAYOUT = "mbcard-deepseek-v3-h100-1024gpu-bf16-s4096"

Rows = dict[str, PublishedRow]
Templates = dict[str, Recipe]


def planted(row: PublishedRow, templates: Templates, **changes: object) -> list[tuple[Check, str]]:
    """What is found in a changed copy of `row`."""
    tree = row.model_dump(mode="json") | {"id": "planted"}
    for key, value in changes.items():
        if isinstance(value, dict):
            tree[key] |= value
        else:
            tree[key] = value
    found = contradictions([PublishedRow.model_validate(tree, strict=False)], templates, ())
    assert all(one.known is None for one in found)
    return [(one.check, one.problem) for one in found]


def test_every_contradiction_of_the_registry_has_a_known_cause(rows: Rows, templates: Templates) -> None:
    found = contradictions(rows.values(), templates, KNOWN)
    assert [one for one in found if one.known is None] == []
    assert len({one.row_id for one in found}) == 26


@pytest.mark.parametrize(
    ("row_id", "implied", "counted"),
    [
        ("mb26.02-gpt-oss-120b-h100-64gpu-bf16-s4096", "27.2", "32.6"),
        ("mb26.04.01-gpt-oss-120b-h100-64gpu-bf16-s4096", "27.1", "32.6"),
        ("automodel-oldformula-qwen3-30b-a3b-h100-8gpu-bf16-s4096", "17.9", "23.0"),
    ],
)
def test_the_rows_that_were_counted_wrong_are_found(
    row_id: str, implied: str, counted: str, rows: Rows, templates: Templates
) -> None:
    (found,) = contradictions([rows[row_id]], templates, ())
    assert found.check is Check.FLOPS
    assert f"implies {implied} GFLOPs per token" in found.problem
    assert f"it is {counted} " in found.problem


@pytest.mark.parametrize("known", [known for known in KNOWN if known.check is Check.FLOPS], ids=str)
def test_a_known_count_gives_what_was_printed(known: Known, rows: Rows, templates: Templates) -> None:
    assert known.fits is not None
    for row in (rows[row_id] for row_id in known.rows):
        counted = known.fits.flops_per_token(row, templates[model_key(row.model)].model)
        assert row.implied_flops_per_token == pytest.approx(counted, rel=0.005)


def test_a_sound_row_contradicts_nothing(rows: Rows, templates: Templates) -> None:
    assert planted(rows[SOUND], templates) == []


def test_planted_tflops_are_found_and_the_count_that_fits_is_named(rows: Rows, templates: Templates) -> None:
    # 281.2 GFLOPs per token, torchtitan's count, x 1,002 tokens/s
    ((check, problem),) = planted(rows[SOUND], templates, metrics={"tflops_per_gpu": 281.8})
    assert check is Check.FLOPS
    assert problem == (
        "implies 281.2 GFLOPs per token; counted as automodel it is 249.8 (+13%); "
        "it fits mcore-old-fullattn or torchtitan"
    )


def test_a_deviation_within_three_percent_is_rounding(rows: Rows, templates: Templates) -> None:
    assert planted(rows[SOUND], templates, metrics={"tflops_per_gpu": 256.0}) == []


def test_a_planted_step_time_is_found(rows: Rows, templates: Templates) -> None:
    ((check, problem),) = planted(rows[SOUND], templates, metrics={"step_time_s": 4.09})
    assert check is Check.STEP
    assert problem == "prints 1,002 tokens/s/GPU; its step time and batch give 2,003"


def test_planted_accumulation_steps_are_found(rows: Rows, templates: Templates) -> None:
    ((check, problem),) = planted(rows[SOUND], templates, ga=3)
    assert check is Check.ACCUMULATION
    # local batches of 8: 512 / (8 x 64)
    assert problem == "prints 3 accumulation steps; 512 sequences / (8 x DP64) are 1"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_gpus": 1000, "metrics": {"step_time_s": None}}, "TP2 x PP8 x CP1 = 16 GPUs"),
        ({"ep": 96}, "ETP1 x EP96 x PP8 = 768 GPUs"),
        ({"ep": 48, "num_gpus": 768, "metrics": {"step_time_s": None}}, "EP48, 256 experts"),
        ({"vpp": 2, "layout": "Et|(tt|)*30L"}, "32 stages"),
        ({"layout": "Ex|L"}, "unknown layout letters x"),
        ({"gbs": 100, "metrics": {"step_time_s": None}}, "micro batch 1 x DP64 = 64"),
    ],
)
def test_a_layout_that_cannot_exist_is_found(
    changes: dict[str, object], words: str, rows: Rows, templates: Templates
) -> None:
    found = planted(rows[BATCH_OF_A_LAYOUT], templates, **changes)
    assert any(check is Check.LAYOUT and words in problem for check, problem in found), found


def test_a_row_of_an_unknown_model_is_checked_without_its_architecture(
    rows: Rows, templates: Templates
) -> None:
    row = rows["mb25.09-llama3-70b-gb200-64gpu-mxfp8-s8192"]
    assert model_key(row.model) not in templates
    assert planted(row, templates, ga=None) == []
    assert [check for check, _ in planted(row, templates, ga=None, num_gpus=60)] == [Check.LAYOUT]


def test_a_cause_that_explains_nothing_is_a_mistake(rows: Rows, templates: Templates) -> None:
    stale = KNOWN[0].model_copy(update={"rows": (SOUND,)})
    with pytest.raises(RecipeError, match=f"{SOUND}: the row does not contradict itself"):
        contradictions([rows[SOUND]], templates, (stale,))


def test_a_known_cause_is_attached_to_its_row_and_check_alone(rows: Rows, templates: Templates) -> None:
    row_id = "mb25.11-gpt-oss-120b-h100-64gpu-bf16-s4096"
    known = tuple(entry.model_copy(update={"rows": (row_id,)}) for entry in KNOWN if row_id in entry.rows)
    found: tuple[Contradiction, ...] = contradictions([rows[row_id]], templates, known[:1])
    assert [(one.check, one.known is not None) for one in found] == [
        (Check.FLOPS, True),
        (Check.ACCUMULATION, False),
    ]


def test_a_mistyped_check_is_refused_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "contradictions.yaml"
    path.write_text("known:\n- {check: FLOPS, rows: [a], cause: c, source: s}\n")
    with pytest.raises(RecipeError, match=r"contradictions.yaml:2: known.0.check"):
        load_known(path)
