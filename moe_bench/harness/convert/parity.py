"""One rank of a proof: Megatron-Core's model, with Hugging Face's weights, gives its logits and gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from megatron.core import parallel_state
from torch import Tensor

from moe_bench.checkpoints.rule import Rule
from moe_bench.errors import BadInputError
from moe_bench.harness.batches import step_batches
from moe_bench.harness.build import Training, model_chunks, set_seeds, training, transformer_config
from moe_bench.harness.convert.rearrange import global_tensors
from moe_bench.harness.convert.reference import Reference, keep_outputs, reference
from moe_bench.harness.mcore_config import megatron_arguments
from moe_bench.harness.rank import batch_plan, joined
from moe_bench.harness.settings import settings_of
from moe_bench.harness.step import train_step
from moe_bench.harness.weights import local_part, sharded_tensors
from moe_bench.harness.workers import Seat
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityCase:
    """What is compared: a toy under one layout, and the map that its weights go through."""

    recipe: Recipe
    model: ModelSpec
    """What Hugging Face's side is built from: that of the recipe, or else the two are not the same."""
    rules: tuple[Rule, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankParity:
    """What one rank found."""

    logit_error_fraction: float
    """Largest difference over the standard deviation of the reference's logits."""
    output_error_fractions: Mapping[str, float]
    """The same of what leaves the embedding and every layer's attention and MLP, forward through it."""
    loss: float
    reference_loss: float
    gradient_error_fractions: Mapping[str, float]
    """For every parameter that this rank holds part of, by its key in Megatron-Core's checkpoint: the largest
    difference over the largest gradient of the whole tensor."""
    departures: tuple[str, ...]


def parity_rank(case: ParityCase, seat: Seat) -> RankParity:
    """Build both models, give one the other's weights, and compare one step.

    Raises BadInputError, naming the tensor, where the map leaves out a tensor of either model.
    """
    arguments = megatron_arguments(case.recipe)
    settings = settings_of(arguments)
    with joined(arguments, settings, seat.rendezvous, listen_fd=seat.listen_fd) as (device, _):
        config = transformer_config(arguments)
        set_seeds(settings.seed)
        chunks = model_chunks(arguments, settings, config, device=device)
        plan = batch_plan(settings, vocab_size=cast(int, arguments.model["vocab_size"]), device=device)
        (batch,) = step_batches(plan, 0)
        theirs = reference(
            case.model,
            num_mtp_layers=case.recipe.num_mtp_layers,
            tokens=batch["tokens"],
            labels=batch["labels"],
            seed=settings.seed,
        )
        _require_same_tensors(case.rules, theirs.weights)
        load(chunks[0], case.rules, theirs.weights)
        built = training(arguments, settings, config, chunks, device=device)
        seen: list[Tensor] = []
        outputs: dict[str, Tensor] = {}
        keep_outputs(outputs, chunks[0].embedding, chunks[0].decoder.layers, attention="self_attention")
        chunks[0].output_layer.register_forward_hook(
            lambda module, args, output: seen.append(output[0].detach().clone())
        )
        loss = train_step(built, [batch]).loss
        return RankParity(
            logit_error_fraction=max(_logit_errors(theirs, seen)),
            output_error_fractions=_output_errors(theirs, outputs),
            loss=math.nan if loss is None else float(loss),
            reference_loss=theirs.loss,
            gradient_error_fractions=_gradient_errors(case.rules, built, theirs),
            departures=theirs.departures,
        )


def load(chunk: torch.nn.Module, rules: Iterable[Rule], weights: Mapping[str, Tensor]) -> None:
    """Copy into a model's parameters and buffers what the map makes of Hugging Face's `weights`.

    Raises BadInputError for a tensor of the model that the map does not have.
    """
    makers = global_tensors(rules, weights.__getitem__)
    with torch.no_grad():
        for shard in sharded_tensors(chunk):
            if shard.key not in makers:
                raise BadInputError(f"{shard.key}: the map has no such tensor; add its rule")
            whole = makers[shard.key]()
            if tuple(whole.shape) != tuple(shard.global_shape):
                raise BadInputError(
                    f"{shard.key}: the map makes {list(whole.shape)} of it, the model has "
                    f"{list(shard.global_shape)}; mend its rule"
                )
            shard.data.copy_(local_part(shard, whole))


def _require_same_tensors(rules: Iterable[Rule], weights: Mapping[str, Tensor]) -> None:
    """Every tensor of Hugging Face's model is in the map, and the other way round."""
    mapped = {named.name for rule in rules for named in rule.huggingface}
    for name in sorted(mapped ^ weights.keys()):
        where = "the map" if name in mapped else "Hugging Face's model"
        raise BadInputError(f"{name}: only {where} has it; mend the rules")


def _logit_errors(theirs: Reference, seen: Sequence[Tensor]) -> list[float]:
    """Of each call of the output layer; ours are [tokens, sequences, this rank's part of the vocabulary]."""
    errors = []
    for mine, whole in zip(seen, theirs.logits, strict=True):
        own = _own_part(whole.transpose(0, 1), axis=-1, size=mine.shape[-1])
        errors.append(_largest(mine - own) / float(whole.std()))
    return errors


def _output_errors(theirs: Reference, outputs: Mapping[str, Tensor]) -> dict[str, float]:
    """Ours are [this rank's part of the tokens, sequences, hidden]."""
    errors = {}
    for place, whole in theirs.outputs.items():
        mine = outputs[place]
        own = _own_part(whole.transpose(0, 1), axis=0, size=mine.shape[0])
        errors[place] = _largest(mine - own) / float(whole.std())
    return errors


def _own_part(whole: Tensor, *, axis: int, size: int) -> Tensor:
    """What this tensor-parallel rank has of an axis that is divided, or whole, where `size` is all of it."""
    rank = parallel_state.get_tensor_model_parallel_rank() if size < whole.shape[axis] else 0
    return whole.narrow(axis, rank * size, size)


def _largest(difference: Tensor) -> float:
    """Largest absolute value; infinite where one is not a number."""
    return float(torch.nan_to_num(difference.abs(), nan=math.inf).max())


def _gradient_errors(rules: Iterable[Rule], built: Training, theirs: Reference) -> dict[str, float]:
    """Every parameter's gradient beside the reference's, found as its weights were.

    The weights have done their work: gradients take their place, so that the sharded state dict says of
    them, as it does of weights, which part of which global tensor they are.
    """
    chunk: Any = built.chunks[0].module
    for parameter in tuple(chunk.parameters()):
        parameter.data = parameter.main_grad
    makers = global_tensors(
        (rule for rule in rules if rule.huggingface[0].name in theirs.gradients),
        theirs.gradients.__getitem__,
    )
    errors: dict[str, float] = {}
    for shard in sharded_tensors(chunk):
        if shard.key not in makers:  # a buffer: the bias that only chooses experts
            continue
        whole = makers[shard.key]()
        scale = max(float(whole.abs().max()), torch.finfo(whole.dtype).tiny)
        error = _largest(shard.data.detach() - local_part(shard, whole)) / scale
        errors[shard.key] = max(error, errors.get(shard.key, 0.0))
    return errors
