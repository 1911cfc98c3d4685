"""Operations of state-space layers and gated delta nets by hand."""

from moe_bench.analysis.state_flops import (
    delta_net_projection_flops,
    delta_net_state_flops,
    mamba_projection_flops,
    mamba_state_flops,
)
from moe_bench.spec.mixer import GatedDeltaNet, Mamba2

NANO = Mamba2(num_heads=64, head_dim=64, state_size=128, num_groups=8)
NEXT = GatedDeltaNet(
    num_key_heads=16, key_head_dim=128, num_value_heads=32, value_head_dim=128, full_attention_every=4
)


def test_projections_of_a_mamba_layer_match_a_hand_count() -> None:
    # into gate, input, state and time steps, and out: 2688 x (3 x 4096 + 2048 + 64)
    assert mamba_projection_flops(tokens=1, hidden=2688, inner=4096, mamba=NANO) == 2 * 2688 * 14_400


def test_the_state_of_a_mamba_layer_costs_seven_operations_per_element() -> None:
    assert mamba_state_flops(tokens=3, inner=4096, state_size=128) == 3 * 7 * 4096 * 128


def test_the_estimate_of_the_scan_is_near_the_products_of_the_chunked_algorithm() -> None:
    # arXiv:2405.21060, 6: scores within a chunk per group, their product with the input, states in and out
    chunk = 128
    within = 2 * chunk * NANO.num_groups * NANO.state_size + 2 * chunk * NANO.inner_width
    through = 2 * 2 * NANO.state_size * NANO.inner_width
    estimate = mamba_state_flops(tokens=1, inner=NANO.inner_width, state_size=NANO.state_size)
    assert abs(estimate / (within + through) - 1) < 0.1


def test_projections_of_a_gated_delta_net_match_a_hand_count() -> None:
    # 2048 x (queries, keys 2 x 2048; values, gate, output 3 x 4096; two gates of 32 heads), and a convolution
    weights = 2048 * (4096 + 12_288 + 64) + 4 * 8192
    assert delta_net_projection_flops(tokens=5, hidden=2048, net=NEXT) == 2 * 5 * weights


def test_the_delta_rule_is_four_products_with_the_state_of_a_head() -> None:
    assert delta_net_state_flops(tokens=1, net=NEXT) == 4 * 2 * 32 * 128 * 128
