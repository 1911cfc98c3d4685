"""Whether an engine computes the layer that it is given: output and all gradients against float64."""

from __future__ import annotations

import math

from torch import Tensor

from moe_bench.harness.layer.engine import BuiltLayer
from moe_bench.harness.layer.peers.textbook import Textbook
from moe_bench.harness.layer.weights import LayerWeights
from moe_bench.results.layer_peers import TensorDifference
from moe_bench.spec.layer_case import LayerCase

MAX_CHECKED_ROWS = 32_768
"""Experts' rows in the check; in float64 the loop keeps several tensors of the hidden size of each."""

ALLOWED_FRACTION = {"fp32": 1e-5, "bf16": 2.0**-5}
"""By the precision that the engines are asked for; nobody is asked for a lower one (`comparable`).

BF16 rounds by up to u = 2^-8. An output or gradient passes about a dozen roundings on its way, which add up
to about 2 u; 8 u leaves room for the largest of many values, and is well below what one wrong expert does to
its own gradients. FP32 rounds by 6e-8; sums over thousands of terms are held to 1e-5.
"""


def num_checked_tokens(case: LayerCase) -> int:
    """As many of the case's first tokens as a float64 loop has memory for."""
    return max(1, min(case.num_tokens, MAX_CHECKED_ROWS // case.moe.top_k))


def observed(layer: BuiltLayer, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """What one forward and backward pass gives: `output`, and gradients of `input` and of every weight."""
    layer.clear_gradients()
    leaf = x.detach().clone().requires_grad_()
    output = layer.forward(leaf)
    output.backward(gradient)
    found = {"output": output.detach(), **layer.gradients().named()}
    if leaf.grad is not None:
        found["input"] = leaf.grad
    layer.clear_gradients()
    return found


def reference(case: LayerCase, weights: LayerWeights, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """The textbook's loop in float64, on the values that the engines get."""
    exact = LayerWeights(**{name: value.double() for name, value in weights.named().items()})
    with Textbook().build(case, exact, device=str(x.device)) as layer:
        return observed(layer, x.double(), gradient.double())


def differences(found: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[TensorDifference, ...]:
    """How far each tensor is from the reference; one that is missing on either side differs without bound."""
    return tuple(
        TensorDifference(tensor=name, difference_fraction=_fraction(found.get(name), exact.get(name)))
        for name in sorted(found.keys() | exact.keys())
    )


def _fraction(value: Tensor | None, exact: Tensor | None) -> float | None:
    if value is None or exact is None or value.shape != exact.shape:
        return None
    error = value.double() - exact
    fraction = max(float(error.norm() / exact.norm()), float(error.abs().max() / exact.abs().max()))
    return fraction if math.isfinite(fraction) else None
