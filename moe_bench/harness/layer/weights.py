"""The weights of one MoE layer in one form that every engine's are copied from and read back to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from moe_bench.errors import MissingRequirementError
from moe_bench.spec.layer_case import LayerCase


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """Weights, or their gradients. E experts in all, L of them on this rank, d hidden, n expert width.

    Matrices are [out, in]: y = x W^T. A gated projection has its gate's rows first, then the linear part's.
    """

    router: Tensor
    """[E, d]"""
    router_bias: Tensor | None = None
    """[E], added to the logits."""
    expert_bias: Tensor | None = None
    """[E] in FP32, added to the scores for the choice alone; not trained, so None among gradients."""
    fc1: Tensor
    """[L, 2n, d]"""
    fc1_bias: Tensor | None = None
    """[L, 2n]"""
    fc2: Tensor
    """[L, d, n]"""
    fc2_bias: Tensor | None = None
    """[L, d]"""
    shared_fc1: Tensor | None = None
    """[2s, d]"""
    shared_fc2: Tensor | None = None
    """[d, s]"""
    shared_gate: Tensor | None = None
    """[1, d]; its sigmoid scales what the shared expert gives."""

    def named(self) -> dict[str, Tensor]:
        """Those that the layer has, by field."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def dtype_of(case: LayerCase) -> torch.dtype:
    """Of weights and activations; in FP8 and FP4 only the products' inputs are smaller."""
    return torch.float32 if case.precision == "fp32" else torch.bfloat16


def weight_shapes(case: LayerCase) -> dict[str, tuple[int, ...]]:
    """Shape of every weight of the case, by field of `LayerWeights`."""
    moe, hidden, local = case.moe, case.hidden_size, case.num_local_experts
    ffn, shared = moe.expert_ffn_hidden_size, moe.shared_expert_ffn_hidden_size
    halves = 2 if case.activation.is_gated else 1
    shapes: dict[str, tuple[int, ...]] = {
        "router": (moe.num_experts, hidden),
        "fc1": (local, halves * ffn, hidden),
        "fc2": (local, hidden, ffn),
    }
    if case.linear_bias:
        shapes |= {
            "router_bias": (moe.num_experts,),
            "fc1_bias": (local, halves * ffn),
            "fc2_bias": (local, hidden),
        }
    if moe.router.expert_bias:
        shapes["expert_bias"] = (moe.num_experts,)
    if shared:
        shapes |= {"shared_fc1": (halves * shared, hidden), "shared_fc2": (hidden, shared)}
        if moe.shared_expert_gate:
            shapes["shared_gate"] = (1, hidden)
    return shapes


def draw_weights(case: LayerCase, *, device: str) -> LayerWeights:
    """Weights and biases from N(0, init_std), by the seed of the case; no balancing bias has moved yet."""
    generator = torch.Generator(device=device).manual_seed(case.seed)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        if name == "expert_bias":
            return torch.zeros(shape, dtype=torch.float32, device=device)
        values = torch.empty(shape, dtype=dtype_of(case), device=device)
        return values.normal_(std=case.init_std, generator=generator)

    return LayerWeights(**{name: draw(name, shape) for name, shape in weight_shapes(case).items()})


@torch.no_grad()  # type: ignore[untyped-decorator]
def load_weights(layer: MoELayer, weights: LayerWeights) -> None:
    """Copy `weights` into a layer of Megatron-Core, whichever family its modules are of.

    Raises MissingRequirementError where the layer has other weights than these.
    """
    homes = _homes(layer)
    values = weights.named()
    if homes.keys() != values.keys():
        raise MissingRequirementError(
            f"{type(layer.experts).__name__}: has {sorted(homes)}, the case {sorted(values)}"
        )
    for name, parts in homes.items():
        for part, value in _paired(parts, values[name]):
            part.copy_(value)


def gradients_of(layer: MoELayer) -> LayerWeights:
    """Gradients of a layer of Megatron-Core after a backward pass, in the form of its weights.

    A gradient that a kernel added to `main_grad` is read from there. Raises MissingRequirementError where a
    weight has none.
    """
    return LayerWeights(
        **{
            name: _joined(parts, _gradient)
            for name, parts in _homes(layer).items()
            if name != "expert_bias"  # a buffer
        }
    )


def clear_gradients(layer: MoELayer) -> None:
    """Drop the gradients; those that kernels add up are set to zero, for nothing else makes them again."""
    for parameter in layer.parameters():
        parameter.grad = None
        if (main := getattr(parameter, "main_grad", None)) is not None:
            main.zero_()


def _homes(layer: MoELayer) -> dict[str, list[Tensor]]:
    """The tensors of a layer by canonical name: one, or one for each local expert."""
    router, experts, shared = layer.router, layer.experts, layer.shared_experts
    homes: dict[str, list[Tensor]] = {"router": [router.weight]}
    if getattr(router, "bias", None) is not None:
        homes["router_bias"] = [router.bias]
    if getattr(router, "expert_bias", None) is not None:
        homes["expert_bias"] = [router.expert_bias]
    for linear in ("fc1", "fc2"):
        for kind, name in (("weight", linear), ("bias", f"{linear}_bias")):
            parts = list(_expert_tensors(experts, f"linear_{linear}", kind))
            if parts:
                homes[name] = parts
    if shared is not None:
        homes |= {"shared_fc1": [shared.linear_fc1.weight], "shared_fc2": [shared.linear_fc2.weight]}
        if getattr(shared, "gate_weight", None) is not None:
            homes["shared_gate"] = [shared.gate_weight]
    return homes


def _expert_tensors(experts: Any, linear: str, kind: str) -> Iterator[Tensor]:
    """A stack [L, ...], or a matrix for each expert: of a module each, or numbered in one module."""
    if hasattr(experts, "local_experts"):
        for expert in experts.local_experts:
            value = getattr(getattr(expert, linear), kind, None)
            if value is not None:
                yield value
        return
    module = getattr(experts, linear)
    parameters = dict(module.named_parameters(recurse=False))
    if kind in parameters:
        yield parameters[kind]
        return
    for expert in range(experts.num_local_experts):
        if (name := f"{kind}{expert}") in parameters:
            yield parameters[name]


def _paired(parts: list[Tensor], value: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    if len(parts) == 1 and parts[0].numel() == value.numel():
        yield parts[0], value.view_as(parts[0])
    else:
        yield from zip(parts, value, strict=True)


def _joined(parts: list[Tensor], read: Callable[[Tensor], Tensor]) -> Tensor:
    values = [read(part) for part in parts]
    return values[0] if len(values) == 1 else torch.stack(values)


def _gradient(parameter: Any) -> Tensor:
    if parameter.grad is not None and not getattr(parameter, "grad_added_to_main_grad", False):
        return parameter.grad.detach().clone()
    main = getattr(parameter, "main_grad", None)
    if main is None:
        raise MissingRequirementError(
            f"a weight of shape {tuple(parameter.shape)} has no gradient; the backward pass does not reach "
            "it, so nothing of it can be compared"
        )
    return main.detach().clone()
