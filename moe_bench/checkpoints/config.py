"""What every family says in its `config.json`, computed from the model, and where a published one differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_bench.errors import BadInputError
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.rope import YarnScaling

Config = dict[str, Any]
"""Keys of a Hugging Face `config.json`, as released checkpoints spell them (transformers 4 and 5 read it)."""

_NOT_FACTS = ("architectures", "model_type", "num_nextn_predict_layers")
"""Names of classes, which forks change; and modules that a checkpoint need not hold, as its tensors show."""


def common_config(model: ModelSpec, *, architecture: str) -> Config:
    """What all families have."""
    return {
        "architectures": [architecture],
        "model_type": model.hf_model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.attention.num_heads,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tied_embeddings,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "rope_theta": model.rope.rope_theta,
        "rope_scaling": None if model.rope.scaling is None else _yarn(model.rope.scaling),
    }


def _yarn(yarn: YarnScaling) -> Config:
    scaling = {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_position_embeddings,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "truncate": yarn.round_correction_range,
    }
    if yarn.mscale_all_dim_factor:
        # absent, the factor alone scales attention, which is what mscale 1 and mscale_all_dim 0 say
        scaling |= {"mscale": yarn.mscale_factor, "mscale_all_dim": yarn.mscale_all_dim_factor}
    return scaling


def require_same_config(model: ModelSpec, ours: Config, theirs: Mapping[str, Any], *, path: Path) -> None:
    """Raise BadInputError, with every key in which the `config.json` in `path` contradicts the model."""
    found = [f"{key} {right}, not {left}" for key, left, right in config_differences(ours, theirs)]
    if found:
        raise BadInputError(
            f"{path}: {'; '.join(found)}; {model.key} is another model, name the one that this is of"
        )


def config_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Keys under which a checkpoint's `config.json` contradicts the model: key, ours, theirs.

    Only keys to which it gives a value count.
    """
    left, right = _flat(ours), _flat(theirs)
    for key, value in left.items():
        if right.get(key) is not None and right[key] != value:
            yield key, value, right[key]


def _flat(config: Mapping[str, Any]) -> Config:
    """One level, with the rope parameters of transformers 4 and 5 under the same keys."""
    skipped = (*_NOT_FACTS, "rope_scaling", "rope_parameters", "rope_theta")
    flat = {key: value for key, value in config.items() if key not in skipped}
    rope = {
        **({"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}),
        **(config.get("rope_scaling") or {}),
        **(config.get("rope_parameters") or {}),
    }
    if "partial_rotary_factor" in flat:
        rope.setdefault("partial_rotary_factor", flat.pop("partial_rotary_factor"))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    flat["rope.type"] = kind
    known = {"rope_theta", "partial_rotary_factor"}
    if kind == "yarn":
        known |= {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"}
        known |= {"mscale", "mscale_all_dim"}
        # what transformers takes where a config leaves it open (modeling_rope_utils.py)
        rope = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, **rope}
    return flat | {f"rope.{key}": value for key, value in rope.items() if key in known}
