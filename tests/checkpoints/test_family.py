"""Maps of all shipped models, held against released checkpoints and Hugging Face's own defaults."""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import Any

import pytest
from transformers import AutoConfig

from moe_bench.checkpoints.config import config_differences
from moe_bench.checkpoints.family import FAMILIES, family_of
from moe_bench.checkpoints.rule import Rule
from moe_bench.errors import BadInputError
from moe_bench.spec.catalogue import recipes_root
from moe_bench.spec.load import Loader
from moe_bench.spec.model import ModelSpec
from tests.test_models import CHECKPOINT_PARAMS

LOADER = Loader(root=recipes_root())
SHIPPED = sorted(path.parent.name for path in LOADER.root.glob("*/model.yaml"))
MODELS = [key for key in SHIPPED if LOADER.model(key).hf_model_type is not None]
WITH_MTP_ON_DISK = {"glm_4_5_air"}
"""Released checkpoints whose counted size holds the prediction layer with its copies."""


def rules_of(model: ModelSpec, *, num_mtp_layers: int) -> list[Rule]:
    return list(family_of(model).rules(model, num_mtp_layers=num_mtp_layers))


@pytest.mark.parametrize("key", sorted(CHECKPOINT_PARAMS))
def test_a_map_holds_every_element_of_the_released_checkpoint(key: str) -> None:
    model = LOADER.model(key)
    rules = rules_of(model, num_mtp_layers=model.num_mtp_layers if key in WITH_MTP_ON_DISK else 0)
    size = sum(prod(rule.shape) * (1 + len(rule.copies)) for rule in rules)
    assert size == CHECKPOINT_PARAMS[key]


@pytest.mark.parametrize("key", MODELS)
def test_no_tensor_is_mapped_twice_and_stacks_are_whole(key: str) -> None:
    model = LOADER.model(key)
    rules = rules_of(model, num_mtp_layers=model.num_mtp_layers)
    names = Counter(name for rule in rules for name in (*(n.name for n in rule.huggingface), *rule.copies))
    assert set(names.values()) == {1}
    experts: dict[str, list[int | None]] = {}
    for rule in rules:
        experts.setdefault(rule.megatron, []).append(rule.expert)
    for indices in experts.values():
        assert indices in ([None], list(range(len(indices))))


# What a class says of itself without arguments is one released model, except for what is listed here.
DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"max_position_embeddings": 4096, "rope.type": "default"},
    "glm_4_5_air": {"attention_bias": False, "rope.rope_theta": 10_000.0},
    "gpt_oss_120b": {},
    "mixtral_8x7b": {"max_position_embeddings": 131_072},
    "olmoe_1b_7b": {"intermediate_size": 2048},
    "qwen3_30b_a3b": {
        "max_position_embeddings": 32_768,
        "num_hidden_layers": 24,
        "norm_topk_prob": False,
        "rope.rope_theta": 10_000.0,
    },
}


@pytest.mark.parametrize("key", DEFAULTS)
def test_the_config_is_the_one_that_the_class_takes_by_default(key: str) -> None:
    model = LOADER.model(key)
    ours = family_of(model).config(model)
    theirs = AutoConfig.for_model(model.hf_model_type).to_dict()
    found = {name: theirs_says for name, _, theirs_says in config_differences(ours, theirs)}
    assert found == DEFAULTS[key]


@pytest.mark.parametrize("key", MODELS)
def test_a_config_that_a_class_has_read_and_written_contradicts_nothing(key: str) -> None:
    model = LOADER.model(key)
    ours = family_of(model).config(model)
    arguments = {name: value for name, value in ours.items() if name != "architectures"}
    assert list(config_differences(ours, AutoConfig.for_model(**arguments).to_dict())) == []


def test_a_config_of_another_model_is_told_by_its_keys() -> None:
    ours = family_of(LOADER.model("deepseek_v3")).config(LOADER.model("deepseek_v3"))
    theirs = family_of(LOADER.model("kimi_k2")).config(LOADER.model("kimi_k2"))
    found = {key for key, _, _ in config_differences(ours, theirs)}
    assert {"rope.factor", "rope.rope_theta", "n_routed_experts", "routed_scaling_factor"} <= found


def test_a_model_without_a_class_is_refused_by_name() -> None:
    model = LOADER.model("deepseek_v3").model_copy(update={"hf_model_type": None})
    with pytest.raises(BadInputError, match="deepseek_v3: no hf_model_type"):
        family_of(model)


def test_a_class_is_refused_for_a_model_of_another_structure() -> None:
    model = LOADER.model("deepseek_v3").model_copy(update={"hf_model_type": "mixtral"})
    with pytest.raises(BadInputError, match="mixtral has no mla"):
        list(family_of(model).rules(model, num_mtp_layers=0))


def test_every_family_has_a_shipped_model() -> None:
    assert {LOADER.model(key).hf_model_type for key in MODELS} == FAMILIES.keys()
