"""Floating-point operations of layers that mix tokens through a state: Mamba-2 and gated delta nets."""

from __future__ import annotations

from moe_bench.spec.mixer import GatedDeltaNet, Mamba2


def mamba_projection_flops(*, tokens: int, hidden: int, inner: int, mamba: Mamba2) -> int:
    """Forward FLOPs of the projections of a Mamba-2 layer that is `inner` channels wide.

    F = 2 T H (2 d + 2 G N + n) + 2 T d H: `mamba_params`. The convolution, norms and gates are left out.
    """
    state_and_time = 2 * mamba.num_groups * mamba.state_size + mamba.num_heads
    return 2 * tokens * hidden * (3 * inner + state_and_time)


def mamba_state_flops(*, tokens: int, inner: int, state_size: int) -> int:
    """Forward FLOPs of updating and reading the state of a Mamba-2 layer: F = 7 T d N.

    Megatron-Core's estimate of the scan (training.py, mamba_layer_flops), within a tenth of the products of
    the chunked algorithm of arXiv:2405.21060, 6, for chunks of 128 tokens.
    """
    return 7 * tokens * inner * state_size


def delta_net_projection_flops(*, tokens: int, hidden: int, net: GatedDeltaNet) -> int:
    """Forward FLOPs of the projections and the convolution of a gated delta net.

    F = 2 T (H (2 K + 3 V + 2 n_v) + w (2 K + V)): Megatron-Core's training.py counts the convolution here.
    """
    projections = hidden * (2 * net.key_width + 3 * net.value_width + 2 * net.num_value_heads)
    return 2 * tokens * (projections + net.conv_width * (2 * net.key_width + net.value_width))


def delta_net_state_flops(*, tokens: int, net: GatedDeltaNet) -> int:
    """Forward FLOPs of updating and reading the state of a gated delta net: F = 8 T n_v d_v^2.

    Four products of the state and a vector per head, as Megatron-Core counts them (training.py).
    """
    return 8 * tokens * net.num_value_heads * net.value_head_dim**2
