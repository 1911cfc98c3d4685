"""The layers of SonicMoE's figure 14."""

from __future__ import annotations

from moe_bench.results.sonicmoe import SHAPES, sonic_shape


def test_there_are_twelve_and_each_group_of_three_does_the_same_work() -> None:
    assert len(SHAPES) == 12
    for first in range(0, 12, 3):
        work = {
            shape.num_tokens * shape.top_k * shape.hidden_size * shape.expert_ffn_hidden_size
            for shape in SHAPES[first : first + 3]
        }
        assert len(work) == 1


def test_a_shape_is_found_by_the_name_of_its_case() -> None:
    for shape in SHAPES:
        case = shape.case()
        assert sonic_shape(case.name) == shape
        assert case.num_rows == shape.num_tokens * shape.top_k
    assert sonic_shape("deepseek_v3/h100_sxm_256g_bf16") is None


def test_the_published_layer_is_faster_than_megatron_in_every_shape() -> None:
    for shape in SHAPES:
        assert shape.sonicmoe.forward_flops_per_s > shape.megatron.forward_flops_per_s
        assert shape.sonicmoe.backward_flops_per_s > shape.megatron.backward_flops_per_s
