"""Grouped experts against one token at a time in float64, and against Megatron-Core's SequentialMLP."""

from typing import Any

import pytest
import torch

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.kernels.experts import GroupedExperts
from tests.harness.kernels.configs import gpt_oss_experts, small_config
from tests.harness.kernels.ranks import Groups, without_groups
from tests.harness.kernels.references import experts_reference

COUNTS = [5, 0, 9, 2]
GPT_OSS_REFERENCE = {"alpha": 1.702, "offset": 1.0, "clamp": 0.3}


def experts(
    groups: Groups, *, num_experts: int = 4, are_apart: bool = False, **changes: Any
) -> GroupedExperts:
    """Experts whose parameters are large enough to reach the clamp."""
    config = small_config(num_moe_experts=num_experts, **changes)
    module = GroupedExperts(num_experts, config, pg_collection=groups, are_apart=are_apart)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module


def tokens(dtype: torch.dtype, counts: list[int], hidden: int = 64) -> list[torch.Tensor]:
    """Rows, counts, probabilities and the output's gradient."""
    num_rows = sum(counts)
    return [
        torch.randn(num_rows, hidden).to(dtype),
        torch.tensor(counts),
        torch.rand(num_rows),
        torch.randn(num_rows, hidden).to(dtype),
    ]


def stacked_values(module: GroupedExperts, what: str) -> dict[str, torch.Tensor]:
    """`data` or `grad` of all experts, stacked where each has parameters of its own."""
    values: dict[str, list[torch.Tensor]] = {}
    for name, parameter in module.named_parameters():
        values.setdefault(name.rstrip("0123456789"), []).append(getattr(parameter, what))
    is_apart = module.linear_fc1.are_apart
    return {name: torch.stack(parts) if is_apart else parts[0] for name, parts in values.items()}


def compare_with_reference(
    module: GroupedExperts, *, reference: dict[str, Any], close: dict[str, float]
) -> None:
    """Output and gradients of tokens, probabilities, weights and biases."""
    some = module.linear_fc1.weights[0]
    dtype, device = some.dtype, some.device
    x, counts, probabilities, grad = tokens(dtype, COUNTS)
    x, probabilities = (tensor.to(device).requires_grad_() for tensor in (x, probabilities))
    output, bias = module(x, counts, probabilities)
    output.backward(grad.to(device))
    exact = {
        name: values.double().cpu().requires_grad_()
        for name, values in stacked_values(module, "data").items()
    }
    exact_x, exact_probabilities = (
        tensor.detach().double().cpu().requires_grad_() for tensor in (x, probabilities)
    )
    expected = experts_reference(exact_x, COUNTS, exact_probabilities, exact, **reference)
    expected.backward(grad.double())
    assert bias is None
    pairs = [
        (output, expected),
        (x.grad, exact_x.grad),
        (probabilities.grad, exact_probabilities.grad),
        *((grad, exact[name].grad) for name, grad in stacked_values(module, "grad").items()),
    ]
    for mine, truth in pairs:
        torch.testing.assert_close(mine.double().cpu(), truth, **close)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("is_gpt_oss", [False, True], ids=["swiglu", "gpt-oss"])
@pytest.mark.parametrize("are_apart", [False, True], ids=["stacked", "apart"])
def test_grouped_experts_equal_loops_in_float64(
    are_apart: bool, is_gpt_oss: bool, recompute: bool, groups: Groups
) -> None:
    changes = gpt_oss_experts() if is_gpt_oss else {}
    if recompute:
        changes |= {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}
    module = experts(groups, are_apart=are_apart, **changes)
    assert module.linear_fc2.recompute == recompute
    compare_with_reference(
        module, reference=GPT_OSS_REFERENCE if is_gpt_oss else {}, close={"rtol": 1e-4, "atol": 1e-5}
    )


def test_grouped_experts_in_bf16_are_as_near_as_bf16_allows(groups: Groups) -> None:
    module = experts(groups, params_dtype=torch.bfloat16, bf16=True)
    compare_with_reference(module, reference={}, close={"rtol": 3e-2, "atol": 6e-2})


def test_probabilities_on_the_input_weight_the_tokens_before_the_experts(groups: Groups) -> None:
    module = experts(groups, moe_apply_probs_on_input=True, moe_router_topk=1, moe_router_pre_softmax=True)
    x, counts, probabilities, _ = tokens(torch.float32, COUNTS)
    weights = dict(module.named_parameters())
    weighted = x * probabilities[:, None]
    expected = experts_reference(weighted, COUNTS, torch.ones_like(probabilities), weights)
    torch.testing.assert_close(module(x, counts, probabilities)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("are_apart", [False, True])
def test_a_rank_without_tokens_still_gives_every_parameter_a_gradient(
    are_apart: bool, with_bias: bool, groups: Groups
) -> None:
    module = experts(groups, are_apart=are_apart, **(gpt_oss_experts() if with_bias else {}))
    x, counts, probabilities, _ = tokens(torch.float32, [0, 0, 0, 0])
    output, _ = module(x.requires_grad_(), counts, probabilities)
    output.sum().backward()
    assert output.shape == (0, 64)
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_recomputing_the_activation_keeps_less(groups: Groups) -> None:
    def num_kept(module: GroupedExperts) -> int:
        kept = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor.numel())
            return tensor

        x, counts, probabilities, _ = tokens(torch.float32, COUNTS)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(x.requires_grad_(), counts, probabilities)
        return sum(kept)

    recompute = {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}
    activated = sum(COUNTS) * 32
    assert num_kept(experts(groups)) - num_kept(experts(groups, **recompute)) == activated


@pytest.mark.parametrize(
    ("expert", "expert_tensor", "tensor", "expected"),
    [(1, 1, 1, True), (2, 1, 1, False), (1, 1, 2, False), (1, 2, 2, True)],
)
def test_gradients_go_to_the_expert_buffers_where_the_expert_groups_differ(
    expert: int, expert_tensor: int, tensor: int, expected: bool
) -> None:
    module = experts(
        without_groups(ep=expert, expt_tp=expert_tensor),
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
        tensor_model_parallel_size=tensor,
        sequence_parallel=tensor > 1,
    )
    assert {parameter.allreduce for parameter in module.parameters()} == {expected}


def part_of_two(weights: dict[str, torch.Tensor], rank: int) -> GroupedExperts:
    """Experts whose weights are this rank's half of the whole ones, as Megatron-Core cuts them."""
    module = experts(
        without_groups(rank, expt_tp=2),
        expert_tensor_parallel_size=2,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
    )
    gate, linear = (half.chunk(2, dim=1)[rank] for half in weights["linear_fc1.weight"].chunk(2, dim=1))
    module.linear_fc1.weight.data = torch.cat([gate, linear], dim=1).contiguous()
    module.linear_fc2.weight.data = weights["linear_fc2.weight"].chunk(2, dim=2)[rank].contiguous()
    return module


def test_experts_cut_over_two_ranks_add_up_to_whole_ones() -> None:
    """The dispatcher reduce-scatters the outputs and all-gathers the tokens: sums over the ranks."""
    weights = {"linear_fc1.weight": torch.randn(4, 64, 64), "linear_fc2.weight": torch.randn(4, 64, 32)}
    x, counts, probabilities, grad = tokens(torch.float32, COUNTS)
    parts = []
    for rank in range(2):
        given = [tensor.clone().requires_grad_() for tensor in (x, probabilities)]
        output, _ = part_of_two(weights, rank)(given[0], counts, given[1])
        output.backward(grad)
        parts.append((output.detach(), given[0].grad, given[1].grad))
    exact = [tensor.double().requires_grad_() for tensor in (x, probabilities)]
    whole = {name: weight.double() for name, weight in weights.items()}
    expected = experts_reference(exact[0], COUNTS, exact[1], whole)
    expected.backward(grad.double())
    for index, truth in enumerate((expected, exact[0].grad, exact[1].grad)):
        torch.testing.assert_close((parts[0][index] + parts[1][index]).double(), truth, rtol=1e-4, atol=1e-2)


def test_host_initialisation_gives_each_rank_its_part_of_one_draw() -> None:
    """Two ranks, two experts each, against one rank with four: gates and linear parts cut apart."""

    def drawn(groups: Groups, num_experts: int, *, are_apart: bool = False) -> GroupedExperts:
        torch.manual_seed(7)
        return GroupedExperts(num_experts, small_config(), pg_collection=groups, are_apart=are_apart)

    whole = drawn(without_groups(), 4)
    first_experts = drawn(without_groups(ep=2), 2)
    torch.testing.assert_close(first_experts.linear_fc1.weight, whole.linear_fc1.weight[:2])
    last_experts = drawn(without_groups(1, ep=2), 2, are_apart=True)
    torch.testing.assert_close(torch.stack(last_experts.linear_fc1.weights), whole.linear_fc1.weight[2:])
    first_half = drawn(without_groups(expt_tp=2), 4)
    gate, linear = whole.linear_fc1.weight.chunk(2, dim=1)
    expected = torch.cat([gate[:, :16], linear[:, :16]], dim=1)
    torch.testing.assert_close(first_half.linear_fc1.weight.detach(), expected.detach())
    torch.testing.assert_close(
        first_half.linear_fc2.weight.detach(), whole.linear_fc2.weight[:, :, :16].detach()
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"moe_ffn_hidden_size": 30}, "expert_ffn_hidden_size_per_rank 30"),
        ({"moe_mlp_glu_interleave_size": 16}, "moe_mlp_glu_interleave_size"),
    ],
)
def test_what_the_experts_cannot_do_is_refused(changes: dict[str, Any], named: str, groups: Groups) -> None:
    with pytest.raises(MissingRequirementError, match=named):
        experts(groups, **changes)


def test_a_width_that_the_ranks_do_not_divide_is_refused() -> None:
    with pytest.raises(MissingRequirementError, match="does not divide"):
        experts(without_groups(expt_tp=3))


def test_held_back_weight_gradients_are_refused(groups: Groups) -> None:
    config = small_config()
    config.delay_wgrad_compute = True
    with pytest.raises(MissingRequirementError, match="delay_wgrad_compute"):
        GroupedExperts(4, config, pg_collection=groups)


@pytest.mark.gpu("grouped_mm has another kernel on a CPU")
@pytest.mark.parametrize("is_gpt_oss", [False, True], ids=["swiglu", "gpt-oss"])
@pytest.mark.parametrize("are_apart", [False, True], ids=["stacked", "apart"])
def test_fused_experts_equal_loops_in_float64(are_apart: bool, is_gpt_oss: bool) -> None:
    """Counts on the host and groups of odd sizes, one of them empty: the shapes that need no padding."""
    changes = gpt_oss_experts() if is_gpt_oss else {}
    module = experts(
        without_groups(), are_apart=are_apart, params_dtype=torch.bfloat16, bf16=True, **changes
    ).cuda()
    compare_with_reference(
        module, reference=GPT_OSS_REFERENCE if is_gpt_oss else {}, close={"rtol": 3e-2, "atol": 6e-2}
    )


@pytest.mark.gpu("a CPU is never waited for")
def test_the_experts_never_wait_for_the_device() -> None:
    module = experts(without_groups(), params_dtype=torch.bfloat16, bf16=True, **gpt_oss_experts()).cuda()
    x, counts, probabilities, grad = (tensor.cuda() for tensor in tokens(torch.bfloat16, COUNTS))
    x.requires_grad_()
    module(x, counts, probabilities)[0].backward(grad)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(x, counts, probabilities)[0].backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
