"""Which Hugging Face class a model has, and what can be said of it without loading any."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from moe_bench.checkpoints import deepseek, glm4_moe, gpt_oss, mixtral, olmoe, qwen3_moe
from moe_bench.checkpoints.config import Config
from moe_bench.checkpoints.parts import LayerRules, grouped_layer, model_rules
from moe_bench.checkpoints.rule import Rule
from moe_bench.errors import BadInputError
from moe_bench.spec.model import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Models that one Hugging Face class runs."""

    config: Callable[[ModelSpec], Config]
    """What `config.json` says of the model."""
    layer_rules: LayerRules

    def rules(self, model: ModelSpec, *, num_mtp_layers: int) -> Iterator[Rule]:
        """Every tensor of the model, with `num_mtp_layers` prediction modules."""
        return model_rules(model, self.layer_rules, num_mtp_layers=num_mtp_layers)


FAMILIES: Mapping[str, Family] = {
    "deepseek_v2": Family(config=deepseek.v2_config, layer_rules=deepseek.layer_rules),
    "deepseek_v3": Family(config=deepseek.v3_config, layer_rules=deepseek.layer_rules),
    "glm4_moe": Family(config=glm4_moe.config, layer_rules=grouped_layer),
    "gpt_oss": Family(config=gpt_oss.config, layer_rules=gpt_oss.layer_rules),
    "mixtral": Family(config=mixtral.config, layer_rules=partial(grouped_layer, names=mixtral.NAMES)),
    "olmoe": Family(config=olmoe.config, layer_rules=partial(grouped_layer, whole_vector_norm=True)),
    "qwen3_moe": Family(config=qwen3_moe.config, layer_rules=grouped_layer),
}
"""By Hugging Face's `model_type`."""


def family_of(model: ModelSpec) -> Family:
    """The family of a model; BadInputError where its file names no class that has a map."""
    if model.hf_model_type is None:
        raise BadInputError(
            f"{model.key}: no hf_model_type in its model file; name one of {', '.join(FAMILIES)}"
        )
    return FAMILIES[model.hf_model_type]
