"""What layers of hybrid models keep: half layers, Mamba-2 and gated delta nets, beside plain ones.

Megatron-Core 0.19.2, ssm/mamba_mixer.py and ssm/gated_delta_net; mamba_ssm ops/triton/ssd_combined.py,
MambaSplitConv1dScanCombinedFn; flash-linear-attention 0.5.1, modules/conv/triton/ops.py and
ops/gated_delta_rule/chunk.py. Passes over a layer are those of a plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction

from moe_bench.analysis.activations import activation_element_bytes, token_counts
from moe_bench.spec.mixer import GatedDeltaNet, Mamba2
from moe_bench.spec.model import LayerStructure, Mixer
from moe_bench.spec.recipe import Recipe

DELTA_CHUNK_TOKENS = 64
"""Tokens whose interactions the gated delta rule inverts at once, and keeps."""

_INPUT, _SECOND_INPUT = "layer_input", "mlp_input"


def kept_by_structures(recipe: Recipe, kept: Mapping[str, int], *, is_moe: bool) -> dict[str, int]:
    """Bytes by tensor of the mean layer among those with experts, or without them; `kept` is a plain layer's.

    A tensor of one mixer or MLP counts for the share of layers that have it. A half layer has one residual
    input, and what a plain layer keeps ahead of its second one belongs to the mixer.
    """
    model = recipe.model
    structures = [
        model.layer(index) for index in range(model.num_layers) if model.is_moe_layer(index) == is_moe
    ]
    if not structures or all(_is_plain(one) for one in structures):
        return dict(kept)
    mixed = _share(structures, _is_attention)
    transformed = _share(structures, lambda one: one.ffn is not None)
    whole = _share(structures, lambda one: one.mixer is not None and one.ffn is not None)
    norms = _share(structures, lambda one: one.mixer is not None)
    found: dict[str, int] = {}
    share = mixed
    for name, size in kept.items():
        if name == _SECOND_INPUT:
            share = transformed
        by_name = {_INPUT: Fraction(1), _SECOND_INPUT: whole, "attention_norm": norms}
        found[name] = round(size * by_name.get(name, share))
    for mixer, elements in _mixer_elements(recipe).items():
        count = Fraction([one.mixer for one in structures].count(mixer), len(structures))
        found[mixer] = round(_gathered_bytes(recipe) * elements * count)
    return {name: size for name, size in found.items() if size}


def mamba_elements(mamba: Mamba2) -> int:
    """Elements per token that a Mamba-2 mixer keeps, its norm left out.

    The input projection, 2 I + 2 G N + h; the state's output before and after the gate, and the norm of that,
    which the output projection reads: 3 I.
    """
    projected = mamba.inner_width + mamba.conv_channels + mamba.num_heads
    return projected + 3 * mamba.inner_width


def delta_net_elements(net: GatedDeltaNet) -> int:
    """Elements per token that a gated delta net keeps, its norm left out.

    The input projection, 2 K + 2 V + 2 h, of which the convolution keeps a view, and a copy of its gate;
    normed queries and keys, 2 K, and both repeated for every value head; values; what the delta rule keeps of
    each chunk; its output; that one's norm, and the same scaled by the gate.
    """
    heads = net.num_value_heads
    projected = 2 * net.key_width + 2 * net.value_width + 2 * heads
    repeated = 2 * heads * net.key_head_dim
    return projected + 2 * net.key_width + repeated + 5 * net.value_width + heads * DELTA_CHUNK_TOKENS


def _mixer_elements(recipe: Recipe) -> dict[Mixer, Fraction]:
    """By mixer, on one tensor-parallel rank."""
    model, tensor = recipe.model, recipe.parallel.tensor
    found: dict[Mixer, Fraction] = {}
    if model.mamba is not None:
        found["mamba"] = Fraction(mamba_elements(model.mamba), tensor)
    if model.gated_delta_net is not None:
        found["gated_delta_net"] = Fraction(delta_net_elements(model.gated_delta_net), tensor)
    return found


def _gathered_bytes(recipe: Recipe) -> int:
    return activation_element_bytes(recipe) * token_counts(recipe).gathered


def _is_plain(structure: LayerStructure) -> bool:
    return _is_attention(structure) and structure.ffn is not None


def _is_attention(structure: LayerStructure) -> bool:
    return structure.mixer in ("attention", "compressed_attention")


def _share(structures: list[LayerStructure], has: Callable[[LayerStructure], bool]) -> Fraction:
    return Fraction(sum(map(has, structures)), len(structures))
