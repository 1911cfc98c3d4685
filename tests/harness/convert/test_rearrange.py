"""Rearrangements: each is undone by its inverse, and puts known heads and gates where they are read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_bench.checkpoints.rule import (
    AlternatingGate,
    GroupedQkv,
    Place,
    Rearrangement,
    Rule,
    Same,
    Shape,
    Stacked,
    TransposedExperts,
)
from moe_bench.errors import BadInputError
from moe_bench.harness.convert.rearrange import global_tensors, to_huggingface, to_megatron

TOP = Place(megatron="", huggingface="")


def rule_of(how: Rearrangement, *shapes: Shape, shape: Shape | None = None) -> Rule:
    names = tuple(f"part{index}" for index in range(len(shapes)))
    more = {} if shape is None else {"shape": shape}
    return TOP.rule("whole", names, *shapes, how=how, **more)


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    size = st.integers(1, 4)
    groups, heads, dim, width = (draw(size) for _ in range(4))
    tail = draw(st.sampled_from([(), (width,)]))
    qkv = GroupedQkv(num_query_groups=groups, heads_per_group=heads, head_dim=dim)
    q, k = (groups * heads * dim, *tail), (groups * dim, *tail)
    return draw(
        st.sampled_from(
            [
                rule_of(Same(), (groups, *tail)),
                rule_of(Stacked(), (groups, *tail), (heads, *tail)),
                rule_of(qkv, q, k, k),
                rule_of(TransposedExperts(), (groups, heads, dim), shape=(groups, dim, heads)),
                rule_of(
                    AlternatingGate(is_bias=False), (groups, width, 2 * dim), shape=(groups, 2 * dim, width)
                ),
                rule_of(AlternatingGate(is_bias=True), (groups, 2 * dim)),
            ]
        )
    )


@given(rules())
def test_every_rearrangement_is_undone_by_its_inverse(rule: Rule) -> None:
    parts = [torch.randn(named.shape) for named in rule.huggingface]
    whole = to_megatron(rule, parts)
    assert tuple(whole.shape) == rule.shape
    assert sorted(whole.flatten().tolist()) == sorted(torch.cat([p.flatten() for p in parts]).tolist())
    for part, back in zip(parts, to_huggingface(rule, whole), strict=True):
        assert torch.equal(part, back)


def test_queries_stand_in_front_of_the_key_and_value_of_their_group() -> None:
    qkv = GroupedQkv(num_query_groups=2, heads_per_group=2, head_dim=1)
    rule = rule_of(qkv, (4, 1), (2, 1), (2, 1))
    q, k, v = torch.tensor([[0.0], [1], [2], [3]]), torch.tensor([[10.0], [11]]), torch.tensor([[20.0], [21]])
    assert to_megatron(rule, [q, k, v]).flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_gates_that_alternate_are_gathered_in_front() -> None:
    weight = rule_of(AlternatingGate(is_bias=False), (1, 2, 4), shape=(1, 4, 2))
    gate_up = torch.tensor([[[0.0, 10, 1, 11], [2, 12, 3, 13]]])  # gates below ten
    assert to_megatron(weight, [gate_up]).tolist() == [[[0, 2], [1, 3], [10, 12], [11, 13]]]
    bias = rule_of(AlternatingGate(is_bias=True), (1, 4))
    assert to_megatron(bias, [torch.tensor([[0.0, 10, 1, 11]])]).tolist() == [[0, 1, 10, 11]]


def test_a_tensor_of_another_shape_is_named() -> None:
    with pytest.raises(BadInputError, match=r"part0: shape \[3, 2\], but the model says \[2, 3\]"):
        to_megatron(rule_of(Same(), (2, 3)), [torch.zeros(3, 2)])


def test_tensors_of_several_types_are_not_joined() -> None:
    parts = [torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.bfloat16)]
    with pytest.raises(BadInputError, match=r"part1 torch\.bfloat16"):
        to_megatron(rule_of(Stacked(), (1, 1), (1, 1)), parts)


def test_experts_are_stacked_in_their_order() -> None:
    experts = [TOP.rule("stack", f"{index}", (1,), expert=index, num_experts=2) for index in range(2)]
    made = global_tensors(experts, lambda name: torch.tensor([float(name)]))
    assert made["stack"]().tolist() == [[0.0], [1.0]]
