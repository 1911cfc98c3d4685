"""Core attention against loops in float64: windows, sinks, MLA's widths, GQA, several ranks, GPUs."""

import itertools
from typing import Any

import pytest
import torch

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.kernels.attention import AttentionFeatures, CoreAttention, attention_implementation
from moe_bench.harness.kernels.attention_kernels import zigzag_positions
from tests.harness.kernels.configs import small_config
from tests.harness.kernels.ranks import Groups, without_groups
from tests.harness.kernels.references import attention_reference

PLAIN = AttentionFeatures(
    dtype=torch.bfloat16, k_channels=128, v_channels=128, window=None, has_sink=False, cp_size=1
)
CASES = {
    "plain": {},
    "window": {"window_size": (5, 0)},
    "sink": {"softmax_type": "learnable"},
    "off by one": {"softmax_type": "off-by-one"},
    "window and sink": {"window_size": (5, 0), "softmax_type": "learnable"},
}


def attention(
    groups: Groups, *, layer_number: int = 1, device_type: str = "cpu", **changes: Any
) -> CoreAttention:
    from megatron.core.transformer.enums import AttnMaskType

    widths = {name: changes.pop(name) for name in ("k_channels", "v_channels") if name in changes}
    return CoreAttention(
        small_config(**changes),
        layer_number,
        AttnMaskType.causal,
        "self",
        pg_collection=groups,
        device_type=device_type,
        **widths,
    )


def inputs(
    *,
    num_tokens: int = 16,
    num_heads: int = 4,
    num_groups: int = 2,
    k_channels: int = 16,
    v_channels: int = 16,
) -> list[torch.Tensor]:
    """Query, key, value and the output's gradient in float64."""
    return [
        torch.randn(num_tokens, 2, heads, channels, dtype=torch.float64)
        for heads, channels in ((num_heads, k_channels), (num_groups, k_channels), (num_groups, v_channels))
    ] + [torch.randn(num_tokens, 2, num_heads * v_channels, dtype=torch.float64)]


def with_gradients(
    tensors: list[torch.Tensor], dtype: torch.dtype, device: str = "cpu"
) -> list[torch.Tensor]:
    return [tensor.to(device, dtype).detach().requires_grad_() for tensor in tensors]


def sink_of(module: CoreAttention) -> torch.Tensor | None:
    return module.softmax_offset


def compare_with_reference(
    module: CoreAttention, tensors: list[torch.Tensor], dtype: torch.dtype, **close: float
) -> None:
    """Outputs and gradients of query, key, value and sinks, the reference in float64 from the same values."""
    *qkv, grad = tensors
    device = module.device_type
    given = with_gradients(qkv, dtype, device)
    exact = [tensor.detach().double().cpu().requires_grad_() for tensor in given]
    sink = sink_of(module)
    exact_sink = None if sink is None else sink.detach().double().cpu().requires_grad_()
    output = module(*given, None)
    output.backward(grad.to(device, dtype))
    expected = attention_reference(*exact, scale=module.softmax_scale, window=module.window, sink=exact_sink)
    expected.backward(grad)
    torch.testing.assert_close(output.double().cpu(), expected, **close)
    for mine, reference in zip(given, exact, strict=True):
        torch.testing.assert_close(mine.grad.double().cpu(), reference.grad, **close)
    if isinstance(sink, torch.nn.Parameter):
        torch.testing.assert_close(sink.grad.double().cpu(), exact_sink.grad, **close)


@pytest.mark.parametrize("case", CASES)
def test_masked_attention_equals_loops_in_float64(case: str, groups: Groups) -> None:
    module = attention(groups, **CASES[case])
    if isinstance(module.softmax_offset, torch.nn.Parameter):
        module.softmax_offset.data = torch.randn(4)
    compare_with_reference(module, inputs(), torch.float32, rtol=1e-5, atol=1e-5)


def test_values_may_be_narrower_than_keys_and_the_scale_may_be_given(groups: Groups) -> None:
    module = attention(groups, k_channels=24, v_channels=16)
    assert module.softmax_scale == pytest.approx(24**-0.5)
    module.softmax_scale = 0.37
    tensors = inputs(num_groups=4, k_channels=24)
    compare_with_reference(module, tensors, torch.float32, rtol=1e-5, atol=1e-5)


def test_a_skipped_layer_has_no_window(groups: Groups) -> None:
    every_second = {"window_size": (5, 0), "window_attn_skip_freq": 2}
    windows = [attention(groups, layer_number=layer, **every_second).window for layer in (1, 2, 3, 4)]
    assert windows == [5, None, 5, None]


def sink_shard(groups: Groups) -> tuple[Any, ...]:
    module = attention(groups, softmax_type="learnable")
    sharded = module.sharded_state_dict("core.")["core.softmax_offset"]
    return module.softmax_offset.tensor_model_parallel, sharded.global_shape, sharded.global_offset


def test_a_sink_is_split_over_tensor_parallel_ranks_and_marked_so(run_ranks: Any) -> None:
    ranks = run_ranks(sink_shard, 2, {"tensor_model_parallel_size": 2})
    assert ranks == [(True, (4,), (0,)), (True, (4,), (2,))]


def test_a_layer_without_a_learned_sink_has_no_parameters(groups: Groups) -> None:
    for softmax_type in ("vanilla", "off-by-one"):
        module = attention(groups, softmax_type=softmax_type)
        assert not list(module.parameters())
        assert module.sharded_state_dict("core.", metadata={"dp_cp_group": module.cp_group}) == {}


@pytest.mark.parametrize(
    ("device_type", "changes", "expected"),
    [
        ("cpu", {}, "torch:masked"),
        ("cuda", {}, "torch:sdpa_flash"),
        ("cuda", {"k_channels": 192}, "torch:sdpa_flash"),
        ("cuda", {"dtype": torch.float32}, "torch:masked"),
        ("cuda", {"window": 127}, "torch:flex"),
        ("cuda", {"has_sink": True}, "torch:flex"),
        ("cuda", {"cp_size": 2}, "torch:flex"),
    ],
)
def test_the_rule_names_the_kernel(device_type: str, changes: dict[str, Any], expected: str) -> None:
    features = AttentionFeatures(**{**_fields(PLAIN), **changes})
    assert attention_implementation(device_type, features) == expected


@pytest.mark.parametrize(
    ("device_type", "changes"),
    [
        ("xpu", {}),
        ("cuda", {"k_channels": 512}),
        ("cuda", {"v_channels": 192}),
        ("cuda", {"cp_size": 2, "k_channels": 8, "v_channels": 8}),
    ],
)
def test_what_no_kernel_can_do_is_refused(device_type: str, changes: dict[str, Any]) -> None:
    features = AttentionFeatures(**{**_fields(PLAIN), **changes})
    with pytest.raises(MissingRequirementError):
        attention_implementation(device_type, features)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"window_size": (5, 5)}, "window_size"),
    ],
)
def test_a_layer_that_would_do_something_else_is_not_built(
    changes: dict[str, Any], named: str, groups: Groups
) -> None:
    with pytest.raises(MissingRequirementError, match=named):
        attention(groups, **changes)


def test_a_mask_from_outside_is_refused(groups: Groups) -> None:
    *qkv, _ = inputs()
    with pytest.raises(MissingRequirementError, match="attention_mask"):
        attention(groups)(*qkv, torch.ones(16, 16, dtype=torch.bool))


def _fields(features: AttentionFeatures) -> dict[str, Any]:
    return {name: getattr(features, name) for name in features.__slots__}


def context_parallel_attention(
    groups: Groups, tensors: list[torch.Tensor], sink: torch.Tensor, changes: dict[str, Any]
) -> list[torch.Tensor]:
    """This rank's share of the output and of the gradients."""
    cp_size = groups.cp.size()
    module = attention(groups, context_parallel_size=cp_size, softmax_type="learnable", **changes)
    module.softmax_offset.data = sink
    num_local = tensors[0].shape[0] // cp_size
    mine = zigzag_positions(num_local, cp_size=cp_size, cp_rank=groups.cp.rank(), device=torch.device("cpu"))
    *qkv, grad = (tensor[mine] for tensor in tensors)
    given = with_gradients(list(qkv), torch.float64)
    output = module.double()(*given, None)
    output.backward(grad)
    return [mine, output.detach(), *(tensor.grad for tensor in given), module.softmax_offset.grad]


@pytest.mark.parametrize("cp_size", [2, 4])
@pytest.mark.parametrize("window", [None, 5])
def test_context_parallel_attention_equals_that_of_one_process(
    cp_size: int, window: int | None, run_ranks: Any
) -> None:
    tensors, sink = inputs(), torch.randn(4, dtype=torch.float64)
    changes = {} if window is None else {"window_size": (window, 0)}
    ranks = run_ranks(
        context_parallel_attention, cp_size, {"context_parallel_size": cp_size}, tensors, sink, changes
    )
    *qkv, grad = tensors
    whole = with_gradients([*qkv, sink], torch.float64)
    expected = attention_reference(*whole[:3], scale=0.25, window=window, sink=whole[3])
    expected.backward(grad)
    for mine, output, *gradients, _ in ranks:
        torch.testing.assert_close(output, expected[mine])
        for gradient, tensor in zip(gradients, whole[:3], strict=True):
            torch.testing.assert_close(gradient, tensor.grad[mine])
    torch.testing.assert_close(sum(rank[-1] for rank in ranks), whole[3].grad)
    assert sorted(itertools.chain(*(rank[0].tolist() for rank in ranks))) == list(range(16))


@pytest.mark.gpu("a CPU has other kernels of attention")
@pytest.mark.parametrize("case", CASES)
def test_fused_attention_equals_loops_in_float64(case: str) -> None:
    module = attention(
        without_groups(), device_type="cuda", params_dtype=torch.bfloat16, bf16=True, **CASES[case]
    ).cuda()
    assert module.implementation == ("torch:sdpa_flash" if case == "plain" else "torch:flex")
    if isinstance(module.softmax_offset, torch.nn.Parameter):
        module.softmax_offset.data.normal_()
    compare_with_reference(module, inputs(num_tokens=48), torch.bfloat16, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu("a CPU has other kernels of attention")
def test_flash_attention_takes_the_widths_of_mla() -> None:
    module = attention(
        without_groups(),
        device_type="cuda",
        params_dtype=torch.bfloat16,
        bf16=True,
        k_channels=192,
        v_channels=128,
    )
    tensors = inputs(num_tokens=32, num_groups=4, k_channels=192, v_channels=128)
    compare_with_reference(module, tensors, torch.bfloat16, rtol=2e-2, atol=2e-2)
