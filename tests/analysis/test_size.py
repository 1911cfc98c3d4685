"""Counted sizes beside the published ones."""

import pytest

from moe_bench.analysis.size import Counting, counted_size
from moe_bench.spec.model import ModelSpec

MODELS = (
    "deepseek_v2_lite", "deepseek_v3", "glm_4_5_air", "gpt_oss_120b", "gpt_oss_20b", "kimi_k2",
    "mixtral_8x22b", "mixtral_8x7b", "moonlight_16b_a3b", "olmoe_1b_7b", "qwen3_235b_a22b", "qwen3_30b_a3b",
)  # fmt: skip


@pytest.mark.parametrize(
    ("key", "with_embeddings", "without_input"),
    [
        ("deepseek_v3", 37_552_297_472, 36_625_618_432),
        ("qwen3_30b_a3b", 3_353_032_704, 3_041_867_776),
        ("gpt_oss_20b", 4_187_440_704, 3_608_307_264),
        ("mixtral_8x7b", 12_879_925_248, 12_748_853_248),
    ],
)
def test_active_parameters_match_hand_counts(
    models: dict[str, ModelSpec], key: str, with_embeddings: int, without_input: int
) -> None:
    model = models[key]
    moe = model.moe
    assert moe is not None
    num_biases = (model.num_layers - model.num_dense_layers) * moe.num_experts * moe.router.expert_bias
    active = counted_size(model).active
    assert active[Counting.WITHOUT_MTP] + num_biases == with_embeddings
    assert active[Counting.WITHOUT_INPUT_EMBEDDING] + num_biases == without_input


@pytest.mark.parametrize("key", MODELS)
def test_the_parts_add_up_to_the_total(models: dict[str, ModelSpec], key: str) -> None:
    size = counted_size(models[key])
    assert sum(size.total_by_part.values()) + size.mtp_total == size.total[Counting.WITH_MTP]
    assert sum(size.active_by_part.values()) + size.mtp_active == size.active[Counting.WITH_MTP]


def test_a_tied_embedding_still_counts_as_the_head(models: dict[str, ModelSpec]) -> None:
    model = models["olmoe_1b_7b"].model_copy(update={"tied_embeddings": True})
    total = counted_size(model).total
    assert total[Counting.WITHOUT_INPUT_EMBEDDING] == total[Counting.WITHOUT_MTP]
    embedding = model.vocab_size * model.hidden_size
    assert total[Counting.WITHOUT_EMBEDDINGS] == total[Counting.WITHOUT_MTP] - embedding
