"""A small random model of Hugging Face's own class: its weights, logits and gradients, by checkpoint name."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_layers import MtpModel

from moe_bench.checkpoints.family import family_of
from moe_bench.spec.model import ModelSpec

GAIN_SPREAD = 0.2
"""Norm gains are drawn around one with this spread, so that a gain in the wrong place shows."""
CHOICE_BIAS_STD = 0.1
"""Of the bias that only chooses experts: enough to change choices, not to make them."""
TABLE_STD = 0.02
"""Of the embedding, as in trained models: small enough for the epsilon of the first norms to show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What Hugging Face's model computes on one batch."""

    weights: Mapping[str, Tensor]
    """By name in a checkpoint."""
    gradients: Mapping[str, Tensor]
    """Of the loss, by the same names; buffers have none."""
    logits: tuple[Tensor, ...]
    """[sequences, tokens, vocabulary] of every prediction module, and last of the model itself."""
    outputs: Mapping[str, Tensor]
    """[sequences, tokens, hidden], forward through the model, by the names that `keep_outputs` gives."""
    loss: float
    """Mean next-token cross entropy, prediction modules left out."""
    departures: tuple[str, ...]
    """In what the model that was compared is not what the class would build from the released config."""


def reference(
    model: ModelSpec, *, num_mtp_layers: int, tokens: Tensor, labels: Tensor, seed: int
) -> Reference:
    """Build, draw and run the model in FP32 on `tokens` [sequences, tokens].

    The loss that is differentiated is the mean cross entropy plus, with prediction modules,
    mtp_loss_factor / depths x the sum of theirs (arXiv:2412.19437, eq. 24 and 25).
    """
    network = _network(model)
    departures = _use_one_epsilon(network, model)
    mtp = MtpModel(network, num_mtp_layers) if num_mtp_layers else None
    values = _named_values(network, mtp, model)
    _draw(values, seed=seed)
    outputs: dict[str, Tensor] = {}
    keep_outputs(outputs, network.model.embed_tokens, network.model.layers, attention="self_attn")
    output = network(tokens, output_hidden_states=True, use_cache=False)
    loss = functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    predicted = [] if mtp is None else _mtp_logits(mtp, output.hidden_states[-1], tokens)
    total = loss
    for depth, logits in enumerate(predicted, start=1):
        known = slice(0, tokens.shape[1] - depth)
        total = total + model.mtp_loss_factor / num_mtp_layers * functional.cross_entropy(
            logits[:, known].flatten(0, 1), labels[:, depth:].flatten()
        )
    total.backward()
    return Reference(
        weights=_by_checkpoint_name(network, {name: value.detach() for name, value in values.items()}),
        gradients=_by_checkpoint_name(
            network, {name: value.grad for name, value in values.items() if value.grad is not None}
        ),
        logits=tuple(logits.detach() for logits in (*predicted, output.logits)),
        outputs=outputs,
        loss=float(loss),
        departures=departures,
    )


def keep_outputs(
    into: dict[str, Tensor], embedding: torch.nn.Module, layers: Iterable[Any], *, attention: str
) -> None:
    """Have what leaves the embedding, and every layer's attention and MLP, put `into` under common names.

    The MLP's place is that of the layer's end. Modules that give a bias left to add have it added.
    """

    def keeper(name: str) -> Callable[..., None]:
        def keep(module: torch.nn.Module, inputs: object, output: Any) -> None:
            first, *rest = output if isinstance(output, tuple) else (output,)
            has_bias = name.endswith("attention") and rest and rest[0] is not None and rest[0].dim() == 1
            into[name] = (first + rest[0] if has_bias else first).detach().clone()

        return keep

    embedding.register_forward_hook(keeper("embedding"))
    for index, layer in enumerate(layers):
        getattr(layer, attention).register_forward_hook(keeper(f"decoder.layers.{index}.self_attention"))
        layer.register_forward_hook(keeper(f"decoder.layers.{index}.mlp"))


def _network(model: ModelSpec) -> Any:
    stated = family_of(model).config(model)
    config = AutoConfig.for_model(**{key: value for key, value in stated.items() if key != "architectures"})
    # eager: plain matrix products, one expert after the other
    network = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    return network.train()


def _use_one_epsilon(network: Any, model: ModelSpec) -> tuple[str, ...]:
    """Give norms of latents the model's epsilon.

    DeepseekV3Attention builds them without one, so that they have 1e-6 whatever `rms_norm_eps` says, while
    Megatron-Core (and vLLM) have one epsilon for all norms.
    """
    departures = set()
    for name, module in network.named_modules():
        epsilon = getattr(module, "variance_epsilon", None)
        if epsilon is not None and epsilon != model.norm_epsilon:
            module.variance_epsilon = model.norm_epsilon
            short = name.rpartition(".")[2]
            departures.add(f"{short}: epsilon {model.norm_epsilon:g}, the class fixes {epsilon:g}")
    return tuple(sorted(departures))


def _named_values(network: Any, mtp: MtpModel | None, model: ModelSpec) -> dict[str, Tensor]:
    """Parameters, and buffers that checkpoints hold, by their names in the model; MTP as further layers."""
    values = dict(network.named_parameters())
    kept = network.state_dict()
    values |= {name: buffer for name, buffer in network.named_buffers() if name in kept}
    if mtp is None:
        return values
    for name, value in (*mtp.layers.named_parameters(), *mtp.layers.named_buffers()):
        depth, _, rest = name.partition(".")
        rest = rest.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
        values[f"model.layers.{model.num_layers + int(depth)}.{rest}"] = value
    return values


def _by_checkpoint_name(network: Any, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As a checkpoint on disk names and shapes them: experts one by one, where the class stacks them.

    A gradient goes the way of its weight: what the library undoes is a rearrangement.
    """
    return dict(revert_weight_conversion(network, dict(values)))


@torch.no_grad()  # type: ignore[untyped-decorator]
def _draw(values: Mapping[str, Tensor], *, seed: int) -> None:
    """Random weights, from their names, with which every part of the model shows in its logits."""
    for name, value in values.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        drawn = torch.randn(value.shape, generator=generator)
        if "e_score_correction_bias" in name:
            drawn *= CHOICE_BIAS_STD
        elif name.endswith("norm.weight"):
            drawn = 1 + GAIN_SPREAD * drawn
        elif "embed_tokens" in name:
            drawn *= TABLE_STD
        elif value.dim() > 1:
            drawn /= value.shape[-1] ** 0.5
        value.copy_(drawn)


def _mtp_logits(mtp: MtpModel, hidden: Tensor, tokens: Tensor) -> list[Tensor]:
    """Logits of each prediction module.

    Depth d sees the tokens d positions on, with zeros behind the end, as in Megatron-Core
    (multi_token_prediction.py, roll_tensor).
    """
    positions = torch.arange(tokens.shape[1]).unsqueeze(0)
    logits = []
    for depth in range(mtp.num_mtp_layers):
        tokens = functional.pad(tokens[:, 1:], (0, 1))
        hidden = mtp.forward_layer(depth, hidden, positions, None, input_ids=tokens)
        logits.append(mtp.shared_head(hidden))
    return logits
