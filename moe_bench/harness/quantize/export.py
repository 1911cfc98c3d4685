"""A quantised checkpoint as Hugging Face's: values and scales under the names that servers read.

nvidia-modelopt's own export (export_mcore_gpt_to_hf) walks modules of Megatron-Core and Transformer Engine,
not our grouped experts, and wants the released model's folder. The map of names is therefore that of
`moe_bench.checkpoints`; values, scales and configuration are modelopt's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from modelopt import __version__
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
from modelopt.torch.export.quant_utils import process_layer_quant_config
from torch import Tensor

from moe_bench.checkpoints.family import family_of
from moe_bench.checkpoints.rule import AlternatingGate, Rule, TransposedExperts
from moe_bench.errors import BadInputError
from moe_bench.harness.convert.rearrange import to_huggingface
from moe_bench.harness.convert.to_huggingface import (
    QUANTIZER,
    MegatronReader,
    Named,
    convert_to_huggingface,
    plain,
)
from moe_bench.harness.quantize.formats import STORAGE, stored, stored_input_scale
from moe_bench.harness.quantize.program import Quantized
from moe_bench.spec.quantization import QuantizeJob

HF_QUANT_CONFIG = "hf_quant_config.json"
_WEIGHT = ".weight"


def export(
    job: QuantizeJob,
    found: Quantized,
    checkpoint: Path,
    target: Path,
    *,
    rules: Sequence[Rule],
    max_shard_bytes: int,
    on_tensor: Callable[[Rule], None],
) -> None:
    """Write the folder `target` of what `found` says of `checkpoint`, tensor by tensor.

    Raises BadInputError where checkpoint and model do not match, MissingRequirementError where the disk is
    full. What may be exported at all says `require_layout`.
    """
    model = job.plan.recipe.model
    reader = MegatronReader(checkpoint)
    reader.require_match(rules, beside=QUANTIZER)
    is_stacked = any(_is_stack(rule) for rule in rules)
    described = _stacked_config() if is_stacked else _config(job, rules, found)
    in_config = described if is_stacked else convert_hf_quant_config_format(described)

    def written(rule: Rule, whole: Tensor) -> Named:
        if rule.megatron not in found.keys:
            yield from plain(rule, whole)
        elif _is_stack(rule):
            yield from _stored_stack(rule, whole)
        else:
            yield from _stored(job, found, rule, whole)

    convert_to_huggingface(
        rules,
        reader,
        target,
        config={**family_of(model).config(model), "quantization_config": in_config},
        max_shard_bytes=max_shard_bytes,
        on_tensor=on_tensor,
        stored=written,
        files={} if is_stacked else {HF_QUANT_CONFIG: described},
    )


def _is_stack(rule: Rule) -> bool:
    return isinstance(rule.how, TransposedExperts | AlternatingGate) and rule.megatron.endswith(_WEIGHT)


def require_layout(job: QuantizeJob, rules: Sequence[Rule]) -> None:
    """Raise BadInputError where nobody has published how such a quantised model lies in files."""
    is_published = job.asked.format == "mxfp4" and job.asked.experts_only
    if any(map(_is_stack, rules)) and not is_published:
        raise BadInputError(
            f"{job.plan.recipe.model.key}: the published layout of its stacked experts is MXFP4, and nothing "
            "beside them is quantised; export with --format mxfp4 --experts-only"
        )


def _stored(job: QuantizeJob, found: Quantized, rule: Rule, whole: Tensor) -> Named:
    """What is fused here and apart there shares the scales of whole tensors; blocks lie within a row."""
    format, module = job.asked.format, rule.megatron.removesuffix(_WEIGHT)
    expert = "" if rule.expert is None else f"[{rule.expert}]"
    largest = found.largest.get(f"{module}.weight_quantizer{expert}")
    tensors = stored(whole, format, None if largest is None else torch.tensor(largest))
    largest_input = found.largest.get(f"{module}.input_quantizer")
    if largest_input is not None:
        tensors["input_scale"] = stored_input_scale(format, largest_input)
    for kind, tensor in tensors.items():
        parts = to_huggingface(rule, tensor) if tensor.dim() else (tensor,) * len(rule.huggingface)
        for named, part in zip(rule.huggingface, parts, strict=True):
            yield f"{named.name.removesuffix(_WEIGHT)}.{kind}", part


def _stored_stack(rule: Rule, whole: Tensor) -> Named:
    """[experts, out, in] as GPT-OSS's files have it: blocks [experts, out, groups, bytes] and exponents."""
    tensors = stored(whole, "mxfp4", None)
    (named,) = rule.huggingface
    for kind, tensor in (("blocks", tensors["weight"]), ("scales", tensors["weight_scale"])):
        rows = tensor
        if isinstance(rule.how, AlternatingGate):
            rows = tensor.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        yield f"{named.name}_{kind}", rows.unflatten(-1, (-1, 16)) if kind == "blocks" else rows


def _config(job: QuantizeJob, rules: Sequence[Rule], found: Quantized) -> dict[str, Any]:
    """`hf_quant_config.json`: the format, and every matrix that has none."""
    layers: dict[str, Any] = {}
    for rule in rules:
        is_quantized = rule.megatron in found.keys
        for named in rule.huggingface:
            if len(named.shape) > 1:
                module = named.name.removesuffix(_WEIGHT)
                layers[f"{module}.quantization"] = job.asked.format if is_quantized else None
                layers[f"{module}.awq_block_size"] = STORAGE[job.asked.format].block_size or 0
    return {
        "producer": {"name": "modelopt", "version": __version__},
        "quantization": process_layer_quant_config(layers),
    }


def _stacked_config() -> Mapping[str, Any]:
    """As OpenAI's `config.json` has it (huggingface.co/openai/gpt-oss-20b)."""
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return {"quant_method": "mxfp4", "modules_to_not_convert": kept}
