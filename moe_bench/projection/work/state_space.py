"""State-space mixers as operations: Mamba-2 layers and gated delta nets of hybrid models."""

from __future__ import annotations

from moe_bench.analysis.activations import token_counts
from moe_bench.analysis.state_flops import delta_net_state_flops, mamba_state_flops
from moe_bench.projection.work.attention import add_norm_and_residual
from moe_bench.projection.work.operations import Part, Pass, StateUpdate
from moe_bench.projection.work.tally import NO_MODULES, Tally
from moe_bench.spec.mixer import GatedDeltaNet, Mamba2

_BYTES = 2
_PART = Part.STATE_MIXER
_LAUNCHES = 80
"""Kernels of norm, projections, convolution, scan, gated norm and residual, forward and backward."""

_CONV_PASSES = 4
_STATE_PASSES = 4
"""Times that the channels of the convolution, and of the scan's input and output, are read or written
forward: convolution, its activation, the layout that the scan wants, states of chunks, gate and norm."""


def add_mamba(tally: Tally, mamba: Mamba2) -> None:
    """A Mamba-2 mixer (arXiv:2405.21060) with its norm and residual."""
    recipe = tally.recipe
    counts, hidden, tensor = token_counts(recipe), recipe.model.hidden_size, recipe.parallel.tensor
    rows, inner = counts.gathered, mamba.inner_width
    add_norm_and_residual(tally, _BYTES * counts.sharded * hidden)
    columns = (inner + mamba.conv_channels + mamba.num_heads) / tensor
    tally.gemm(_PART, rows, hidden, columns)
    _add_scan(
        tally,
        conv_elements=rows * mamba.conv_channels / tensor,
        state_elements=rows * inner / tensor,
        flops=mamba_state_flops(tokens=rows, inner=inner, state_size=mamba.state_size) / tensor,
        is_delta_rule=False,
    )
    tally.gemm(_PART, rows, inner / tensor, hidden)
    tally.launch(_LAUNCHES, captured_by="attn")


def add_gated_delta_net(tally: Tally, net: GatedDeltaNet) -> None:
    """A gated delta net (arXiv:2412.06464) with its norm and residual."""
    recipe = tally.recipe
    counts, hidden, tensor = token_counts(recipe), recipe.model.hidden_size, recipe.parallel.tensor
    rows = counts.gathered
    add_norm_and_residual(tally, _BYTES * counts.sharded * hidden)
    columns = (2 * net.key_width + 2 * net.value_width + 2 * net.num_value_heads) / tensor
    tally.gemm(_PART, rows, hidden, columns)
    _add_scan(
        tally,
        conv_elements=rows * (2 * net.key_width + net.value_width) / tensor,
        state_elements=rows * net.value_width / tensor,
        flops=delta_net_state_flops(tokens=rows, net=net) / tensor,
        is_delta_rule=True,
    )
    tally.gemm(_PART, rows, net.value_width / tensor, hidden)
    tally.launch(_LAUNCHES, captured_by="attn")


def _add_scan(
    tally: Tally, *, conv_elements: float, state_elements: float, flops: float, is_delta_rule: bool
) -> None:
    """Convolution, scan, gate and norm; backward moves and computes twice as much."""
    moved = _BYTES * (_CONV_PASSES * conv_elements + _STATE_PASSES * state_elements)
    tally.move(_PART, forward_bytes=moved, backward_bytes=2 * moved)
    passes = [(in_pass, flops) for in_pass in tally.forward_passes(NO_MODULES)] + [(Pass.DGRAD, 2 * flops)]
    for in_pass, num_flops in passes:
        tally.operations.append(
            StateUpdate(in_pass=in_pass, num_flops=num_flops, is_delta_rule=is_delta_rule)
        )
