"""One rank of a proof: Megatron-Core's model, with Hugging Face's weights, gives its logits and gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
from moe_bench.harness.convert.reference import Reference, reference
from moe_bench.harness.mcore_config import megatron_arguments
from moe_bench.harness.process_groups import process_groups
from moe_bench.harness.rank import batch_plan, machine
from moe_bench.harness.settings import settings_of
from moe_bench.harness.step import train_step
from moe_bench.harness.weights import local_part, sharded_tensors
from moe_bench.harness.workers import Seat
from moe_bench.spec.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityCase:
    """What is compared: a toy under one layout, and the map that its weights go through."""

    recipe: Recipe
    rules: tuple[Rule, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorError:
    """How far the gradient of one tensor is off on this rank."""

    name: str
    """Key in Megatron-Core's checkpoint."""
    error_fraction: float
    """Largest difference over the largest gradient of the tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankParity:
    """What one rank found."""

    max_logit_error: float
    logit_spread: float
    """Standard deviation of the reference's logits: what an error is to be seen beside."""
    loss: float
    reference_loss: float
    gradients: tuple[TensorError, ...]
    """Of every parameter that this rank holds."""
    departures: tuple[str, ...]


def parity_rank(case: ParityCase, seat: Seat) -> RankParity:
    """Build both models, give one the other's weights, and compare one step.

    Raises BadInputError, naming the tensor, where the map leaves out a tensor of either model.
    """
    arguments = megatron_arguments(case.recipe)
    settings = settings_of(arguments)
    model = case.recipe.model
    with (
        machine(settings, seat.rendezvous) as (device, _),
        process_groups(
            seat.rendezvous, backend="gloo", sizes=arguments.parallel_state, listen_fd=seat.listen_fd
        ),
    ):
        config = transformer_config(arguments)
        set_seeds(settings.seed)
        chunks = model_chunks(arguments, settings, config, device=device)
        plan = batch_plan(settings, vocab_size=cast(int, arguments.model["vocab_size"]), device=device)
        (batch,) = step_batches(plan, 0)
        theirs = reference(
            model,
            num_mtp_layers=case.recipe.num_mtp_layers,
            tokens=batch["tokens"],
            labels=batch["labels"],
            seed=settings.seed,
        )
        _require_same_tensors(case.rules, theirs.weights)
        load(chunks[0], case.rules, theirs.weights)
        built = training(arguments, settings, config, chunks, device=device)
        seen: list[Tensor] = []
        chunks[0].output_layer.register_forward_hook(
            lambda module, args, output: seen.append(output[0].detach().clone())
        )
        outcome = train_step(built, [batch])
        loss = 0.0 if outcome.loss is None else float(outcome.loss)
        return _compared(case, built, theirs, seen, loss=loss)


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


def _compared(
    case: ParityCase, built: Training, theirs: Reference, seen: list[Tensor], *, loss: float
) -> RankParity:
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    errors = []
    for mine, whole in zip(seen, theirs.logits, strict=True):
        # [tokens, sequences, this rank's part of the vocabulary]
        width = mine.shape[-1]
        own = whole.transpose(0, 1)[..., tp_rank * width : (tp_rank + 1) * width]
        errors.append(float((mine - own).abs().max()))
    return RankParity(
        max_logit_error=max(errors),
        logit_spread=float(theirs.logits[-1].std()),
        loss=loss,
        reference_loss=theirs.loss,
        gradients=tuple(_gradient_errors(case.rules, built, theirs)),
        departures=theirs.departures,
    )


def _gradient_errors(rules: Iterable[Rule], built: Training, theirs: Reference) -> list[TensorError]:
    """Every parameter's gradient beside the reference's, found as its weights were.

    The weights have done their work: gradients take their place, so that the sharded state dict says of
    them, as it does of weights, which part of which global tensor they are.
    """
    chunk: Any = built.chunks[0].module
    trained = tuple(chunk.parameters())
    for parameter in trained:
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
        error = float((shard.data.detach() - local_part(shard, whole)).abs().max()) / scale
        errors[shard.key] = max(error, errors.get(shard.key, 0.0))
    return [TensorError(name=name, error_fraction=error) for name, error in errors.items()]
