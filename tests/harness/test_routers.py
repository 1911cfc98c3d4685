"""Routers against textbook layers, values and gradients, and what must hold of every choice.

The textbook weighs the output of every expert for every token by a matrix [tokens, experts], which is written
down from each paper, token by token; experts and balancing losses are written out as well.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_bench.harness.draws import begin_micro_batch, whole_draws
from moe_bench.harness.mcore_config import megatron_arguments
from moe_bench.harness.patches import patch_names, patches
from moe_bench.harness.routers import (
    CapacityRouter,
    ExpertChoiceRouter,
    GShardRouter,
    tell_dispatchers,
    within_capacity,
)
from moe_bench.spec.model import ExpertStep
from moe_bench.spec.recipe import Recipe, Recompute, TokenDrop
from tests.harness.kernels.configs import small_config
from tests.harness.kernels.fused.layers import moe_layer
from tests.harness.kernels.ranks import Groups, groups_of_one
from tests.harness.toys import laid_out, parity_recipe
from tests.harness.zygote import Zygote

Weigh = Callable[[Tensor], Tensor]
"""Of logits [tokens, experts], in float64, what each expert's output counts."""
EXPERTS = 8
SEQ_LEN, SEQUENCES = 24, 2
SAMPLE, SEED = 40, 7
TOKENS = SEQ_LEN * SEQUENCES


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    with groups_of_one() as groups, patches(patch_names("host")):
        begin_micro_batch(torch.tensor(SAMPLE))
        yield groups


def top(scores: Tensor, k: int) -> list[list[int]]:
    return [sorted(range(EXPERTS), key=lambda e: -float(row[e]))[:k] for row in scores]


def switch(logits: Tensor, *, capacity: int | None) -> Tensor:
    """arXiv:2101.03961, equations 1 to 3: p of the best expert, whose capacity the first tokens fill."""
    p, taken = logits.softmax(-1), [0] * EXPERTS
    kept = torch.zeros_like(p)
    for token, (best,) in enumerate(top(p, 1)):
        if capacity is None or taken[best] < capacity:
            taken[best] += 1
            kept[token, best] = 1.0
    return p * kept


def two_experts(logits: Tensor, *, capacity: int | None = None) -> Tensor:
    """arXiv:2401.04088, 2.1: softmax over the best two.

    A capacity counts both choices of a token at once, in the order of the tokens.
    """
    p, taken = logits.softmax(-1), [0] * EXPERTS
    rows = []
    for token, experts in enumerate(top(p, 2)):
        total = p[token, experts].sum()
        row = torch.zeros(EXPERTS, dtype=p.dtype)
        for expert in experts:
            taken[expert] += 1
            if capacity is None or taken[expert] <= capacity:
                row[expert] = 1.0
        rows.append(row * p[token] / total)
    return torch.stack(rows)


def two_of_all(logits: Tensor) -> Tensor:
    """arXiv:2405.04434, equations 20 to 22: p over all experts, weights p of the best two."""
    p = logits.softmax(-1)
    kept = torch.zeros_like(p)
    for token, experts in enumerate(top(p, 2)):
        kept[token, experts] = 1.0
    return p * kept


def sigmoid_experts(logits: Tensor) -> Tensor:
    """arXiv:2412.19437, equations 13 to 15 without groups and bias: s of the best two over their sum."""
    return grouped(logits, bias=torch.zeros(EXPERTS), num_groups=1, groups_per_token=1, top_k=2)


def grouped(
    logits: Tensor, *, bias: Tensor, num_groups: int, groups_per_token: int, top_k: int, scale: float = 1.0
) -> Tensor:
    """arXiv:2412.19437, 2.1.2: s + b of a group's best k / groups added up, experts of the best groups by
    s + b, weights s over their sum.
    """
    s, size = logits.sigmoid(), EXPERTS // num_groups
    kept = torch.zeros_like(s)
    for token, row in enumerate((s + bias).tolist()):
        members = [range(first, first + size) for first in range(0, EXPERTS, size)]
        value = [
            sum(sorted((row[e] for e in group), reverse=True)[: top_k // groups_per_token])
            for group in members
        ]
        best = sorted(range(num_groups), key=lambda g: -value[g])[:groups_per_token]
        allowed = sorted((e for g in best for e in members[g]), key=lambda e: -row[e])
        kept[token, allowed[:top_k]] = 1.0
    return scale * s * kept / (s * kept).sum(-1, keepdim=True)


def gshard(logits: Tensor, *, capacity: int) -> Tensor:
    """arXiv:2006.16668, algorithm 1: all first experts, then second ones where 2 g2 exceeds a draw of [0, 1).

    The draws are those of the layer.
    """
    key = f"{SEED}:{SAMPLE}:decoder.0"
    draws = whole_draws(key, (SEQUENCES, SEQ_LEN), device=torch.device("cpu")).T.flatten().tolist()
    p, best, taken = logits.softmax(-1), top(logits, 2), [0] * EXPERTS
    kept = torch.zeros_like(p)
    for token, (first, _) in enumerate(best):
        if taken[first] < capacity:
            kept[token, first] = 1.0
        taken[first] += 1
    for token, (first, second) in enumerate(best):
        g2 = float(p[token, second] / (p[token, first] + p[token, second]))
        if 2 * g2 > draws[token]:
            if taken[second] < capacity:
                kept[token, second] = 1.0
            taken[second] += 1
    totals = torch.stack([p[token, experts].sum() for token, experts in enumerate(best)])
    return p / totals.unsqueeze(1) * kept


def first_choices(logits: Tensor, top_k: int) -> Tensor:
    """arXiv:2006.16668, algorithm 1, line 13, times E^2: E sum_e (c_e / S) m_e of first choices."""
    return balancing(logits, 1)


def most_probable(logits: Tensor, *, capacity: int) -> Tensor:
    """The best two of a token, of which an expert keeps those that weigh most."""
    weights = two_experts(logits)
    kept = torch.zeros_like(weights)
    for expert in range(EXPERTS):
        column = weights[:, expert].tolist()
        for token in sorted(range(len(column)), key=lambda t: -column[t])[:capacity]:
            kept[token, expert] = 1.0
    return weights * kept


def sinkhorn(logits: Tensor, *, top_k: int) -> Tensor:
    """arXiv:2103.16716 as Megatron-Core has it: rows and columns of exp(l) scaled until both are even."""
    balanced = logits.detach().exp()
    for _ in range(2000):
        balanced = balanced / balanced.sum(1, keepdim=True) / len(balanced)
        balanced = balanced / balanced.sum(0, keepdim=True) / EXPERTS
    kept = torch.zeros_like(balanced)
    for token, experts in enumerate(top(balanced, top_k)):
        kept[token, experts] = 1.0
    return (logits.sigmoid() if top_k == 1 else logits.softmax(-1)) * kept


def expert_choice(logits: Tensor, *, capacity: int) -> Tensor:
    """arXiv:2202.09368, equation 1: S = softmax(X W), expert e takes its best C tokens, and weighs by S."""
    scores = logits.softmax(-1)
    kept = torch.zeros_like(scores)
    for expert in range(EXPERTS):
        column = scores[:, expert].tolist()
        for token in sorted(range(len(column)), key=lambda t: -column[t])[:capacity]:
            kept[token, expert] = 1.0
    return scores * kept


def balancing(logits: Tensor, top_k: int) -> Tensor:
    """arXiv:2101.03961, equation 4, of top-k: E sum_e f_e P_e, f_e a share of choices, P_e a mean score."""
    p = logits.softmax(-1)
    chosen = torch.zeros_like(p)
    for token, experts in enumerate(top(p, top_k)):
        chosen[token, experts] = 1.0
    return EXPERTS * (chosen.sum(0) / chosen.sum() * p.mean(0)).sum()


def by_sequence(logits: Tensor, top_k: int) -> Tensor:
    """arXiv:2412.19437, equations 17 to 20, with softmax scores: the same of each sequence, on average."""
    sequences = logits.view(SEQ_LEN, SEQUENCES, EXPERTS).unbind(1)
    return torch.stack([balancing(each, top_k) for each in sequences]).mean()


def z_loss(logits: Tensor, top_k: int) -> Tensor:
    """arXiv:2202.08906, equation 5: the mean squared log of the sum of exponentials."""
    return logits.logsumexp(-1).square().mean()


def textbook(
    layer: Any, x: Tensor, weigh: Weigh, losses: dict[Any, float], top_k: int
) -> tuple[Tensor, Tensor]:
    """Output [tokens, hidden] and the sum of the balancing losses, in float64."""
    named = {name: value.detach().double() for name, value in layer.named_parameters()}
    named = {name: value.requires_grad_() for name, value in named.items()}
    layer.textbook = named
    logits = x @ named["router.weight"].T
    up = torch.einsum("th,efh->etf", x, named["experts.linear_fc1.weight"])
    gate, linear = up.chunk(2, dim=-1)
    outputs = torch.einsum(
        "etf,ehf->eth", torch.nn.functional.silu(gate) * linear, named["experts.linear_fc2.weight"]
    )
    total = sum((factor * loss(logits, top_k) for loss, factor in losses.items()), torch.zeros(()))
    return torch.einsum("te,eth->th", weigh(logits), outputs), total


PRE = {"moe_router_pre_softmax": True}
SINKHORN = {"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0.0}
LOSSES = {balancing: 0.3, by_sequence: 0.2, z_loss: 0.1}
LOSS_FIELDS = {
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
    "moe_aux_loss_coeff": [0.3, 0.2],
    "moe_z_loss_coeff": 0.1,
}
AUX = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.3}
Z_LOSS = {"moe_z_loss_coeff": 0.1}
GLOBAL = {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.3}
FIRST = TokenDrop(capacity_factor=1.0, policy="position")
HALF = TokenDrop(capacity_factor=0.5, policy="position")
NARROW = TokenDrop(capacity_factor=0.5, pad_to_capacity=True, policy="position")
TIGHT = TokenDrop(capacity_factor=0.5, policy="position", min_capacity=5)
PADDED = TokenDrop(capacity_factor=0.75, pad_to_capacity=True, policy="position")
ROOMY = TokenDrop(capacity_factor=4.0, policy="position")
CHOICE = TokenDrop(capacity_factor=1.0, pad_to_capacity=True)
ALLGATHER = {"moe_token_dispatcher_type": "allgather"}

SIGMOID = {"moe_router_score_function": "sigmoid"}
BIAS = torch.tensor([0.3, -0.2, 0.1, 0.0, -0.4, 0.2, 0.05, -0.1])
GROUPED = SIGMOID | {
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 2,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_enable_expert_bias": True,
}
BEST_GROUPS = functools.partial(grouped, bias=BIAS, num_groups=4, groups_per_token=2, top_k=4, scale=2.5)

CASES: dict[str, tuple[int, dict[str, Any], TokenDrop | None, Weigh, dict[Any, float]]] = {
    "Switch, dropless": (1, PRE, None, functools.partial(switch, capacity=None), {}),
    "Switch, its first tokens": (1, PRE, FIRST, functools.partial(switch, capacity=6), {}),
    "Switch, at least five": (1, PRE, TIGHT, functools.partial(switch, capacity=5), {balancing: 0.0}),
    "GShard": (2, AUX, HALF, functools.partial(gshard, capacity=6), {first_choices: 0.3}),
    "GShard, z loss, room for all": (2, Z_LOSS, ROOMY, functools.partial(gshard, capacity=48), {z_loss: 0.1}),
    "GShard, padded, gathered": (2, ALLGATHER, NARROW, functools.partial(gshard, capacity=6), {}),
    "top-2, its first tokens": (2, {}, FIRST, functools.partial(two_experts, capacity=12), {}),
    "top-2, padded": (2, {}, PADDED, functools.partial(two_experts, capacity=9), {}),
    "top-2, gathered": (2, ALLGATHER, FIRST, functools.partial(two_experts, capacity=12), {}),
    "top-2 of softmax over all": (2, PRE, None, two_of_all, {}),
    "top-2 of sigmoid": (2, SIGMOID, None, sigmoid_experts, {}),
    "groups, expert bias, scaling": (4, GROUPED, None, BEST_GROUPS, {}),
    "Mixtral, all local losses": (2, LOSS_FIELDS, None, two_experts, LOSSES),
    "Mixtral, the global loss": (2, GLOBAL, None, two_experts, {balancing: 0.3}),
    "capacity by probability": (
        2,
        {"moe_expert_capacity_factor": 0.5},
        None,
        functools.partial(most_probable, capacity=6),
        {},
    ),
    "capacity by probability, padded, at least five": (
        2,
        {},
        TokenDrop(capacity_factor=0.25, pad_to_capacity=True, min_capacity=5),
        functools.partial(most_probable, capacity=5),
        {},
    ),
    "Sinkhorn": (2, SINKHORN, None, functools.partial(sinkhorn, top_k=2), {}),
    "Sinkhorn, top-1": (1, SINKHORN, None, functools.partial(sinkhorn, top_k=1), {}),
    "expert choice": (2, {}, CHOICE, functools.partial(expert_choice, capacity=12), {}),
    "expert choice, gathered, z loss": (
        2,
        {**ALLGATHER, **Z_LOSS},
        CHOICE,
        functools.partial(expert_choice, capacity=12),
        {z_loss: 0.1},
    ),
}


def layer_of(case: str) -> Any:
    top_k, fields, drop, _, _ = CASES[case]
    submodules: dict[str, Any] = {}
    if drop is not None:
        kind = ExpertChoiceRouter if "expert choice" in case else CapacityRouter
        submodules["router"] = functools.partial(kind, drop=drop)
        if "GShard" in case:
            submodules["router"] = functools.partial(GShardRouter, drop=drop, seed=SEED)
        fields = fields | {
            "moe_expert_capacity_factor": drop.capacity_factor,
            "moe_pad_expert_input_to_capacity": drop.pad_to_capacity,
        }
    from megatron.core.transformer.moe.moe_layer import MoELayer

    layer = moe_layer(MoELayer, small_config(moe_router_topk=top_k, **fields), **submodules)
    layer.set_layer_number(1)
    tell_dispatchers(layer.modules())
    # logits so far apart that float32 and float64 choose alike, and loads so uneven that capacities bite
    layer.router.weight.data *= 20
    if layer.router.expert_bias is not None:
        layer.router.expert_bias.copy_(BIAS)
    return layer


@pytest.mark.parametrize("case", CASES)
def test_a_layer_computes_what_the_textbook_does(case: str, groups: Groups) -> None:
    top_k, _, _, weigh, losses = CASES[case]
    layer = layer_of(case)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SEQ_LEN, SEQUENCES, 64, generator=generator).requires_grad_()
    grad = torch.randn(SEQ_LEN, SEQUENCES, 64, generator=generator)
    output, _ = layer(x)
    output.backward(grad)
    plain = x.detach().double().view(-1, 64).requires_grad_()
    expected, loss = textbook(layer, plain, weigh, losses, top_k)
    ((expected * grad.double().view(-1, 64)).sum() + loss).backward()
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5, check_dtype=False)
    close(output.view(-1, 64), expected)
    close(x.grad.view(-1, 64), plain.grad)
    for name, value in layer.named_parameters():
        close(value.grad, layer.textbook[name].grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", CASES)
def test_every_choice_keeps_to_its_limits(case: str, groups: Groups) -> None:
    top_k, fields, drop, _, _ = CASES[case]
    layer = layer_of(case)
    x = torch.randn(SEQ_LEN, SEQUENCES, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        probs, chosen = layer.router(x)
        output, _ = layer(x)
    factor = fields.get("moe_expert_capacity_factor")
    limit = drop or (TokenDrop(capacity_factor=factor) if factor else None)
    per_expert, per_token = chosen.sum(0), (probs > 0).sum(1)
    if limit is not None:
        capacity = limit.capacity(num_choices=TOKENS * top_k, num_experts=EXPERTS)
        assert int(per_expert.max()) <= capacity
        if limit.pad_to_capacity:
            assert set(per_expert.tolist()) == {capacity}
    if "expert choice" in case:
        assert int(per_token.max()) > top_k > int(per_token.min())
        return
    assert int(per_token.max()) <= top_k
    if limit is None:
        assert set(per_token.tolist()) == {top_k}
    elif drop is ROOMY:
        assert set(per_token.tolist()) == {1, 2}
    else:
        dropped = per_token == 0
        assert bool(dropped.any()), "the capacity does not bite"
        # the residual is all that is left of them
        assert not output.view(-1, 64)[dropped].any()
        assert bool((output.view(-1, 64)[~dropped] != 0).any(dim=1).all())


def test_a_second_expert_gets_a_token_as_often_as_twice_its_weight_says(groups: Groups) -> None:
    layer = layer_of("GShard, z loss, room for all")
    x = torch.randn(1, SEQUENCES, 64, generator=torch.Generator().manual_seed(11)).repeat(4000, 1, 1)
    with torch.no_grad():
        _, chosen = layer.router(x)
        weights, every = layer.eval().router(x)
    assert every.sum(1).unique().tolist() == [2]
    for token in range(SEQUENCES):
        # 4000 draws of probability q deviate by 0.032 at four standard deviations
        expected = 2 * float(weights[token].sort().values[-2])
        found = float(chosen[token::SEQUENCES].sum(1).float().mean()) - 1
        assert 0.1 < expected < 0.9
        assert found == pytest.approx(expected, abs=0.032)


def test_first_choices_fill_a_capacity_before_second_ones_of_earlier_tokens() -> None:
    chosen = torch.tensor([[1, 1], [1, 1], [1, 1], [1, 1]], dtype=torch.bool)
    first = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 1]], dtype=torch.bool)
    _, kept = within_capacity(chosen.float(), chosen, capacity=3, drop=FIRST, rank=first.byte() + chosen)
    assert kept.T.tolist() == [[True, True, True, False], [True, False, True, True]]


def test_a_capacity_of_evaluation_is_another_and_the_dispatcher_knows_it(groups: Groups) -> None:
    from megatron.core.transformer.moe.moe_layer import MoELayer

    drop = TokenDrop(capacity_factor=1.0, eval_capacity_factor=2.0, pad_to_capacity=True)
    config = small_config(moe_expert_capacity_factor=1.0, moe_pad_expert_input_to_capacity=True)
    layer = moe_layer(MoELayer, config, router=functools.partial(CapacityRouter, drop=drop))
    tell_dispatchers(layer.modules())
    x = torch.randn(SEQ_LEN, SEQUENCES, 64)
    found = []
    for is_training in (True, False, True):
        layer.train(is_training)
        layer(x)
        found.append(layer.token_dispatcher.capacity)
    assert found == [12, 24, 12]


def test_megatron_cores_position_keeps_other_tokens_than_the_first() -> None:
    """Why `position` is ours; when this fails, Megatron-Core's own has become right."""
    from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping

    chosen = torch.ones(64, 2, dtype=torch.bool)
    options = {"router_topk": 2, "capacity_factor": 0.25, "drop_policy": "position"}
    _, theirs = apply_router_token_dropping(chosen.float(), chosen, **options)
    _, ours = within_capacity(chosen.float(), chosen, capacity=16, drop=FIRST)
    assert ours.nonzero()[:, 0].tolist() == [token for token in range(16) for _ in range(2)]
    assert theirs.sum(0).tolist() == [16, 16]
    assert not torch.equal(theirs, ours)


def routed(choice: str, drop: TokenDrop | None, **router: Any) -> Recipe:
    """A toy of Mixtral's structure with another router."""
    recipe = parity_recipe("mixtral_8x7b")
    moe = recipe.model.moe
    assert moe is not None
    update = {"choice": choice, "aux_loss": "none", "aux_loss_coefficient": 0.0, **router}
    model = recipe.model.model_copy(
        update={"moe": moe.model_copy(update={"router": moe.router.model_copy(update=update)})}
    )
    fusions = recipe.kernels.fusions.model_copy(update={"router": False})
    kernels = recipe.kernels.model_copy(update={"fusions": fusions})
    return recipe.model_copy(update={"model": model, "token_drop": drop, "kernels": kernels})


def pyramid() -> Recipe:
    """Experts of another number from the third layer on, of another width on the fourth."""
    recipe = routed("top_k", None)
    moe = recipe.model.moe
    assert moe is not None
    steps = tuple(
        ExpertStep(from_layer=layer, num_experts=number, expert_ffn_hidden_size=width)
        for layer, number, width in ((2, 16, 32), (3, 4, 48))
    )
    moe = moe.model_copy(update={"steps": steps, "shared_expert_ffn_hidden_size": 32})
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"moe": moe})})


@pytest.mark.parametrize(
    "parallel",
    [
        {"num_gpus": 2, "expert": 2},
        {"num_gpus": 2, "pipeline": 2},
        pytest.param(
            {
                **{"num_gpus": 4, "tensor": 2, "sequence_parallel": True},
                **{"context": 2, "context_comm": "allgather"},
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["experts", "stages", "parts of sequences"],
)
def test_second_experts_are_the_same_recomputed_and_in_every_layout(
    parallel: dict[str, Any], zygote: Zygote
) -> None:
    toy = routed("gshard", ROOMY, aux_loss="aux_loss", aux_loss_coefficient=0.1)
    full = Recompute(granularity="full", method="uniform", num_layers=1)
    env = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if "tensor" in parallel else {}
    recipes = toy, laid_out(toy, parallel=parallel, recompute=full, env=env)
    plain, split = (zygote.train(megatron_arguments(recipe)).samples for recipe in recipes)
    assert split.losses == pytest.approx(plain.losses, rel=1e-5)
    assert split.grad_norms == pytest.approx(plain.grad_norms, rel=1e-4)
    assert split.tokens_per_expert == plain.tokens_per_expert
    per_layer = [sum(layer) for step in plain.tokens_per_expert for layer in step]
    # 8 sequences of 32 tokens: more than one choice of each, less than two
    assert all(256 < num_choices < 512 for num_choices in per_layer)


ROUTED = {
    "pyramid": pyramid(),
    "Sinkhorn": routed("sinkhorn", None, renormalise=False),
    "expert choice": routed("expert_choice", CHOICE, renormalise=False),
    "first come": routed("top_k", FIRST),
    "residual experts": parity_recipe("pr_moe_350m"),
}


SLOW = ("Sinkhorn", "first come", "pyramid", "residual experts")


@pytest.mark.parametrize(
    "kind",
    [
        "expert choice",
        *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
    ],
)
def test_two_expert_ranks_train_as_one_process_does(kind: str, zygote: Zygote) -> None:
    one = laid_out(ROUTED[kind], parallel={})
    two = laid_out(ROUTED[kind], parallel={"num_gpus": 2, "expert": 2})
    alone, split = (zygote.train(megatron_arguments(recipe)).samples for recipe in (one, two))
    assert split.losses == pytest.approx(alone.losses, rel=1e-5)
    assert split.grad_norms == pytest.approx(alone.grad_norms, rel=1e-4)
    if kind == "pyramid":
        assert {len(layer) for step in split.tokens_per_expert for layer in step} == {8, 16, 4}
    if kind == "expert choice":
        share = math.ceil(one.seq_len * 2 / EXPERTS) * one.global_batch_size
        assert split.tokens_per_expert == (((share,) * EXPERTS,) * 4,) * one.steps.num_timed
