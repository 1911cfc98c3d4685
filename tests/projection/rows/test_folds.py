"""Folds: what is left out together, and what repeats one configuration."""

from __future__ import annotations

from collections import Counter

import pytest

from moe_bench.projection.rows.folds import FoldBy, configuration_key, fold_of, model_family
from tests.projection.published_rows import ROWS, made_row


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Llama3-70B", "Llama3.1-70B"),
        ("Llama3.1-405B", "Llama3.1-405B-proxy-7L"),
        ("Grok-1-314B", "Grok-1-proxy-16L"),
        ("DeepSeek-V3-16B (V2-Lite-like)", "DeepSeek-V3-16B"),
    ],
)
def test_models_of_one_shape_are_left_out_together(one: str, other: str) -> None:
    assert model_family(one) == model_family(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Llama3-8B", "Llama3-70B"),
        ("Qwen3-30B-A3B", "Qwen3-235B-A22B"),
        ("Mixtral-8x22B", "Mixtral-8x22B-G8T8"),
        ("DeepSeek-V3", "DeepSeek-V3-16B"),
    ],
)
def test_models_of_other_shapes_are_folds_of_their_own(one: str, other: str) -> None:
    assert model_family(one) != model_family(other)


def test_two_parts_of_one_gpu_are_left_out_together() -> None:
    folds = {fold_of(made_row(hardware=name), "system") for name in ("H100", "H100-96GB")}
    assert folds == {"h100"}
    assert fold_of(made_row(hardware="GB200"), "system") == "gb200"


def test_a_release_is_suite_and_version() -> None:
    assert fold_of(made_row(), "release") == "Megatron-Bridge 2026-04"
    patch = made_row(version="NeMo 26.04.01 (v0.4.1, 2026-05)")
    assert fold_of(patch, "release") == "Megatron-Bridge 2026-04.1"
    assert fold_of(made_row(framework="Primus", version=None), "release") == "Primus undated"


def test_a_layout_is_the_model_with_its_sizes() -> None:
    assert fold_of(made_row(), "layout") == "qwen3_30b_a3b tp1 pp1 vpp1 cp1 ep8 mbs1"
    assert fold_of(made_row(gbs=512, num_gpus=32), "layout") == fold_of(made_row(), "layout")


def test_a_configuration_repeats_over_releases_and_not_over_batches() -> None:
    later = made_row(
        version="NeMo 26.06 (v0.5.0, 2026-06)", id="later", metrics={"tokens_per_s_per_gpu": 1.0}
    )
    assert configuration_key(later) == configuration_key(made_row())
    for changed in ({"gbs": 512}, {"num_gpus": 32}, {"precision": "MXFP8"}, {"hardware": "GB200"}, {"tp": 2}):
        assert configuration_key(made_row(**changed)) != configuration_key(made_row())


@pytest.mark.parametrize(("by", "folds"), [("model", 36), ("layout", 165), ("system", 12), ("release", 47)])
def test_the_registry_has_folds_to_leave_out(by: FoldBy, folds: int) -> None:
    counts = Counter(fold_of(row, by) for row in ROWS)
    assert sum(counts.values()) == len(ROWS) == 535
    assert len(counts) == folds
