"""Every call that is timed computes what its task names, held against a plain loop in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.calibrate.attention import attention_call
from moe_bench.harness.calibrate.gemm import dense_call, grouped_call
from moe_bench.harness.calibrate.inputs import FreshBackward
from moe_bench.harness.calibrate.launch import bare_samples_s
from moe_bench.harness.calibrate.memory import _permutation, memory_call, routed
from moe_bench.harness.calibrate.moe_layer import moe_layer_call
from moe_bench.results.calibration import AttentionCore, DenseGemm, GroupedGemm, MemoryBound, MoeLayer
from moe_bench.results.calibration_tasks import (
    ADAM,
    ADAM_BF16_MOMENTS,
    DEVICE_TO_DEVICE,
    HOST_TO_DEVICE,
    RESIDUAL,
    RMS_NORM,
    Implementation,
    PermutationVariant,
    RouterVariant,
)

TOKENS = (8, 0, 24, 16)


def tensor(result: object) -> Tensor:
    assert isinstance(result, Tensor)
    return result


def inputs_of(call: Any) -> dict[str, Any]:
    """The tensors that a call has made for itself."""
    return dict(
        zip(call.__code__.co_freevars, (cell.cell_contents for cell in call.__closure__), strict=True)
    )


def grouped(direction: str, *, accumulates_fp32: bool = False) -> GroupedGemm:
    return GroupedGemm.model_validate(
        {
            "operation": "grouped_gemm",
            "direction": direction,
            "tokens_per_expert": TOKENS,
            "num_inputs": 32,
            "num_outputs": 16,
            "accumulates_fp32": accumulates_fp32,
        }
    )


def memory(operation: str, variant: str, *shape: int, direction: str = "forward") -> MemoryBound:
    return MemoryBound.model_validate(
        {
            "operation": operation,
            "direction": direction,
            "variant": variant,
            "shape": shape,
            "num_read_bytes": 1,
            "num_written_bytes": 1,
        }
    )


def test_a_dense_product_is_rows_by_columns() -> None:
    what = DenseGemm(operation="dense_gemm", num_rows=8, num_inner=16, num_columns=32)
    call = dense_call(what, "bf16", Implementation.MM, "cpu")
    made = inputs_of(call)
    expected = made["x"].double() @ made["weight"].double()
    torch.testing.assert_close(tensor(call()).double(), expected, rtol=1e-2, atol=1e-2)
    assert expected.shape == (8, 32)


@pytest.mark.parametrize("direction", ["forward", "dgrad"])
def test_a_grouped_product_multiplies_each_experts_rows_with_its_own_weight(direction: str) -> None:
    call = grouped_call(grouped(direction), "bf16", Implementation.GROUPED_MM, "cpu")
    made = inputs_of(call)
    rows = made["x"].double().split(TOKENS)
    expected = torch.cat([x @ weight.double() for x, weight in zip(rows, made["weight"], strict=True)])
    torch.testing.assert_close(tensor(call()).double(), expected, rtol=2e-2, atol=5e-2)
    assert expected.shape == (sum(TOKENS), 16 if direction == "forward" else 32)


def test_weight_gradients_are_added_to_fp32_call_by_call() -> None:
    what = grouped("wgrad", accumulates_fp32=True)
    call = grouped_call(what, "bf16", Implementation.GROUPED_MM, "cpu")
    made = inputs_of(call)
    pairs = zip(made["gradient"].double().split(TOKENS), made["x"].double().split(TOKENS), strict=True)
    expected = torch.stack([gradient.t() @ x for gradient, x in pairs])
    call()
    twice = tensor(call())
    assert twice.dtype == torch.float32
    torch.testing.assert_close(twice.double(), 2 * expected, rtol=2e-2, atol=1e-1)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_attention_runs_in_both_directions_over_groups_and_narrow_values(direction: str) -> None:
    what = AttentionCore.model_validate(
        {
            "operation": "attention",
            "direction": direction,
            "num_seqs": 2,
            "seq_len": 32,
            "num_heads": 4,
            "num_query_groups": 2,
            "qk_head_dim": 24,
            "v_head_dim": 16,
        }
    )
    result = attention_call(what, "bf16", Implementation.SDPA_FLASH, "cpu")()
    if direction == "forward":
        assert tensor(result).shape == (32, 2, 4 * 16)
    else:
        assert isinstance(result, tuple)
        assert [tuple(gradient.shape) for gradient in result] == [
            (32, 2, 4, 24),
            (32, 2, 2, 24),
            (32, 2, 2, 16),
        ]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_a_window_sees_as_many_tokens_as_it_is_wide_the_query_included() -> None:
    window = {"window_tokens": 1, "num_heads": 1, "num_query_groups": 1, "qk_head_dim": 16, "v_head_dim": 16}
    what = AttentionCore.model_validate(
        {"operation": "attention", "direction": "forward", "num_seqs": 1, "seq_len": 16, **window}
    )
    call = attention_call(what, "fp32", Implementation.FLEX, "cpu")
    torch.testing.assert_close(tensor(call()), inputs_of(call)["value"].flatten(2))


def test_a_windows_gradient_is_refused_on_a_cpu() -> None:
    what = AttentionCore(
        operation="attention",
        direction="backward",
        num_seqs=1,
        seq_len=16,
        num_heads=1,
        num_query_groups=1,
        qk_head_dim=16,
        v_head_dim=16,
        window_tokens=4,
    )
    with pytest.raises(MissingRequirementError, match="no backward pass on a CPU"):
        attention_call(what, "bf16", Implementation.FLEX, "cpu")


@pytest.mark.parametrize(("top_k", "again"), [(1, False), (4, False), (4, True)])
def test_rows_that_went_to_experts_come_back_to_their_tokens(top_k: int, again: bool) -> None:
    variant = PermutationVariant(top_k=top_k, is_sorted_again=again)
    what = memory("permutation", str(variant), 8, 16)
    call = memory_call(what, "fp32", Implementation.INDEXING, "cpu")
    x = torch.randn(8, 16)
    function = _permutation(variant, num_tokens=8, device="cpu")
    torch.testing.assert_close(function(x), top_k * x)
    assert tensor(call()).shape == x.shape


def test_routing_within_groups_chooses_from_the_best_groups_only() -> None:
    scores = torch.tensor([[9.0, -9.0, 1.0, 1.1, 8.0, 7.0, -1.0, -1.0]])
    free = routed(scores, RouterVariant(score="sigmoid", top_k=2))
    assert free.nonzero()[:, 1].tolist() == [0, 4]
    bound = routed(scores, RouterVariant(score="sigmoid", top_k=2, num_groups=4, group_top_k=1))
    assert bound.nonzero()[:, 1].tolist() == [4, 5]
    torch.testing.assert_close(bound.sum(-1), torch.ones(1))


@pytest.mark.parametrize("text", ["softmax top-8", "sigmoid top-8 in 4 of 8 groups"])
def test_a_way_of_routing_reads_as_it_prints(text: str) -> None:
    assert str(RouterVariant.parse(text)) == text


@pytest.mark.parametrize(
    ("what", "dtype", "implementation"),
    [
        (memory("norm", RMS_NORM, 8, 16), "bf16", Implementation.RMS_NORM),
        (memory("norm", RMS_NORM, 8, 16, direction="backward"), "bf16", Implementation.RMS_NORM),
        (memory("norm", RESIDUAL, 8, 16), "bf16", Implementation.ADD),
        (memory("router", "softmax top-2", 8, 16, direction="backward"), "bf16", Implementation.ROUTER),
        (memory("optimizer_step", ADAM, 64), "fp32", Implementation.ADAMW),
        (memory("optimizer_step", ADAM_BF16_MOMENTS, 64), "bf16", Implementation.STORED_ADAM),
        (memory("copy", DEVICE_TO_DEVICE, 64), "bf16", Implementation.COPY),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_operations_bound_by_memory_run_again_and_again(
    what: MemoryBound, dtype: Any, implementation: Implementation
) -> None:
    call = memory_call(what, dtype, implementation, "cpu")
    for _ in range(3):
        call()


def test_a_copy_from_the_host_needs_a_gpu() -> None:
    with pytest.raises(MissingRequirementError, match="need a GPU"):
        memory_call(memory("copy", HOST_TO_DEVICE, 64), "bf16", Implementation.COPY, "cpu")


def test_a_moe_layer_gives_gradients_of_its_input_and_of_all_its_weights() -> None:
    what = MoeLayer(
        operation="moe_layer",
        num_tokens=16,
        hidden_size=32,
        expert_ffn_hidden_size=16,
        num_experts=4,
        top_k=2,
    )
    gradients = moe_layer_call(what, "bf16", "cpu")()
    assert isinstance(gradients, tuple)
    assert [tuple(one.shape) for one in gradients] == [(16, 32), (4, 32), (4, 32, 32), (4, 32, 16)]
    assert all(one.float().abs().sum() > 0 for one in gradients)


def test_bare_launches_are_timed_as_often_as_everything_else() -> None:
    assert len(bare_samples_s(10, device="cpu")) == 10


def test_a_backward_pass_that_frees_what_it_saved_runs_again_after_another_forward() -> None:
    x = torch.randn(4, requires_grad=True)
    factor = torch.tensor(3.0)
    call = FreshBackward(lambda: x * x * factor, [x, torch.zeros(1, requires_grad=True)])
    for _ in range(2):
        call.before()
        first, unused = call()  # type: ignore[misc]
        assert first.shape == x.shape
        assert unused is None
    with pytest.raises(RuntimeError, match="second time"):
        call()


@pytest.mark.gpu("_scaled_mm has another kernel on a CPU")
@pytest.mark.parametrize(
    "implementation", [Implementation.SCALED_MM_TENSORWISE, Implementation.SCALED_MM_ROWWISE]
)
def test_fp8_products_agree_with_their_factors_in_float64(implementation: Implementation) -> None:
    what = DenseGemm(operation="dense_gemm", num_rows=64, num_inner=128, num_columns=32)
    call = dense_call(what, "fp8_e4m3", implementation, "cuda")
    made = inputs_of(call)
    expected = made["x"].double() @ made["weight"].double()
    torch.testing.assert_close(tensor(call()).double(), expected, rtol=2e-2, atol=2e-1)


@pytest.mark.gpu("scaled_grouped_mm has no CPU kernel")
@pytest.mark.parametrize("direction", ["forward", "dgrad"])
def test_grouped_fp8_products_agree_with_their_factors_in_float64(direction: str) -> None:
    call = grouped_call(grouped(direction), "fp8_e4m3", Implementation.SCALED_GROUPED_MM, "cuda")
    made = inputs_of(call)
    rows = made["x"].double().split(TOKENS)
    expected = torch.cat([x @ weight.double() for x, weight in zip(rows, made["weight"], strict=True)])
    torch.testing.assert_close(tensor(call()).double(), expected, rtol=2e-2, atol=2e-1)


@pytest.mark.gpu("a CPU has other kernels of attention")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_window_runs_in_both_directions_on_a_gpu(direction: str) -> None:
    what = AttentionCore.model_validate(
        {
            "operation": "attention",
            "direction": direction,
            "num_seqs": 1,
            "seq_len": 256,
            "num_heads": 4,
            "num_query_groups": 2,
            "qk_head_dim": 64,
            "v_head_dim": 64,
            "window_tokens": 128,
        }
    )
    attention_call(what, "bf16", Implementation.FLEX, "cuda")()
    torch.cuda.synchronize()


@pytest.mark.gpu("memory is pinned for a GPU")
def test_what_is_copied_from_pinned_memory_arrives() -> None:
    call = memory_call(memory("copy", HOST_TO_DEVICE, 4096), "bf16", Implementation.COPY, "cuda")
    made = inputs_of(call)
    made["target"].zero_()
    call()
    torch.cuda.synchronize()
    assert torch.equal(made["target"].cpu(), made["source"])
