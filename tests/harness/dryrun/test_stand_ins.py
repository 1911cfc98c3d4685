"""Stand-ins keep what their entries say; on a GPU, the real kernels keep the same."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from moe_bench.harness.dryrun import stand_in_kernels as kernels
from moe_bench.harness.dryrun.operator_flops import FlopKind
from moe_bench.harness.dryrun.stand_ins import STAND_INS, stand_ins
from moe_bench.harness.kernels.fused.chunk_order import sort_rows, source_rows
from moe_bench.harness.kernels.fused.permutation import permute, unpermute
from moe_bench.harness.kernels.fused.routing import Choice, route, scores_for_losses
from moe_bench.harness.kernels.fused.row_map import row_map
from moe_bench.spec.recipe import Fusions
from tests.harness.dryrun.conftest import toy

ENTRIES = [entry for family in STAND_INS.values() for entry in family]
BATCH, HEADS, GROUPS, TOKENS, CHANNELS = 2, 8, 2, 64, 32


class Kept:
    """A tensor as autograd keeps it, for as long as it does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_bytes(compute: Callable[[], Any], *, besides: Iterable[Tensor] = ()) -> int:
    """Bytes of the different storages that autograd keeps, each counted once, without those of `besides`."""
    kept: list[weakref.ref[Kept]] = []

    def pack(tensor: Tensor) -> Kept:
        held = Kept(tensor)
        kept.append(weakref.ref(held))
        return held

    with saved_tensors_hooks(pack, lambda held: held.tensor):
        output = compute()
    assert output is not None
    storages = {
        held.tensor.untyped_storage()._cdata: held.tensor.untyped_storage().nbytes()
        for reference in kept
        if (held := reference()) is not None
    }
    left_out = {tensor.untyped_storage()._cdata for tensor in besides}
    return sum(size for storage, size in storages.items() if storage not in left_out)


def make(*shape: int, device: str, requires_grad: bool = True) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device=device, requires_grad=requires_grad)


def ignore(kind: FlopKind, num_flops: int) -> None:
    """Operations are counted elsewhere."""


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.kernel)
def test_every_entry_says_where_it_was_read_and_that_no_gpu_has_confirmed_it(entry: Any) -> None:
    assert entry.keeps
    assert any(
        project in entry.source
        for project in ("torch 2", "transformer_engine 2", "megatron-core 0", "moe_bench/", "quack-kernels 0")
    )
    assert not entry.verified


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "window", "pairs"),
    [
        (64, 64, None, 64 * 32),
        (32, 64, None, 32 * 32),
        (64, 64, 16, 64 * 16 - 120),
        (32, 64, 16, (64 * 16 - 120) // 2),
        (64, 64, 64, 64 * 32),
    ],
)
def test_pairs_that_a_mask_leaves(num_queries: int, num_keys: int, window: int | None, pairs: int) -> None:
    found = kernels.visible_pairs(num_queries=num_queries, num_keys=num_keys, window_tokens=window)
    assert found == pairs


def test_attention_keeps_its_inputs_its_output_and_a_number_per_row_and_head() -> None:
    query = make(BATCH, HEADS, TOKENS, CHANNELS, device="meta")
    key, value = (make(BATCH, GROUPS, TOKENS, CHANNELS, device="meta") for _ in range(2))
    found = kept_bytes(lambda: kernels.Attention.apply(query, key, value, None, ignore))
    rows = BATCH * TOKENS
    assert found == 2 * rows * CHANNELS * (2 * HEADS + 2 * GROUPS) + 4 * rows * HEADS


def test_our_permutation_keeps_two_numbers_for_each_expert_that_a_token_can_have() -> None:
    tokens, probs = make(TOKENS, 16, device="meta"), make(TOKENS, 8, device="meta")
    rows, weights = make(2 * TOKENS, 16, device="meta"), make(2 * TOKENS, device="meta")
    chosen, counts = torch.empty(TOKENS, 8, dtype=torch.bool, device="meta"), torch.ones(2, 4)
    with stand_ins(toy("qwen3_30b_a3b"), ignore):
        mapped = row_map(chosen, num_slots=2)
        sources = source_rows(counts, num_rows=2 * TOKENS, device=rows.device)
        assert kept_bytes(lambda: permute(tokens, probs, mapped, num_rows=2 * TOKENS)) == 4 * TOKENS * 4
        assert kept_bytes(lambda: unpermute(rows, mapped)) == 4 * TOKENS * 4
        assert kept_bytes(lambda: sort_rows(rows, weights, sources)) == 4 * 2 * TOKENS


def test_our_router_keeps_logits_once_and_its_map() -> None:
    logits = torch.empty(TOKENS, 8, device="meta", requires_grad=True)
    with stand_ins(toy("qwen3_30b_a3b"), ignore):
        routed = kept_bytes(lambda: route(logits, Choice(top_k=2, score="softmax")))
        assert routed == TOKENS * 8 * (4 + 1)
        scored = kept_bytes(lambda: scores_for_losses(logits, top_k=2, score="softmax"))
        assert scored == TOKENS * 8 * 4


@pytest.mark.gpu("a CPU has other kernels of attention")
def test_torchs_flash_kernel_keeps_what_its_stand_in_keeps() -> None:
    query, key, value = (make(BATCH, HEADS, TOKENS, CHANNELS, device="cuda") for _ in range(3))
    backend = torch.nn.attention.SDPBackend.FLASH_ATTENTION
    with torch.nn.attention.sdpa_kernel(backend):
        real = kept_bytes(lambda: functional.scaled_dot_product_attention(query, key, value, is_causal=True))
    stand_in = kept_bytes(lambda: kernels.Attention.apply(query, key, value, None, ignore))
    # the real one also keeps the state of its random numbers
    assert stand_in <= real <= stand_in + 64


@pytest.mark.gpu("what CUDA kernels keep for the backward pass differs from what the CPU's keep")
def test_torchs_norm_keeps_what_its_stand_in_keeps() -> None:
    x, weight = make(TOKENS, CHANNELS, device="cuda"), make(CHANNELS, device="cuda")
    real = kept_bytes(lambda: functional.rms_norm(x, weight.shape, weight, 1e-5))
    assert real == kept_bytes(lambda: kernels.RMSNorm.apply(x, weight))


@pytest.mark.gpu("Transformer Engine has no CPU path")
def test_transformer_engines_permutation_and_router_keep_what_the_closed_form_says() -> None:
    engine = pytest.importorskip("transformer_engine.pytorch")
    router = pytest.importorskip("transformer_engine.pytorch.router")
    tokens, probs = make(TOKENS, 16, device="cuda"), torch.rand(TOKENS, 8, device="cuda", requires_grad=True)
    routing_map = torch.zeros(TOKENS, 8, dtype=torch.bool, device="cuda")
    routing_map[:, :2] = True
    for permutation in (
        lambda: engine.moe_permute_with_probs(tokens, probs, routing_map, num_out_tokens=2 * TOKENS),
        lambda: engine.moe_permute(tokens, routing_map, num_out_tokens=2 * TOKENS),
    ):
        assert kept_bytes(permutation) == 4 * TOKENS * (2 * 8 + 1)
    logits = torch.rand(TOKENS, 8, device="cuda", requires_grad=True)
    real = kept_bytes(
        lambda: router.fused_topk_with_score_function(logits, 2, False, None, None, None, "softmax", None)
    )
    assert real == TOKENS * 8 * (4 + 1)


def test_only_what_a_recipe_uses_is_replaced_and_only_for_a_while() -> None:
    recipe = toy("qwen3_30b_a3b")
    fused = {entry.kernel for entry in ENTRIES if entry.used_by(recipe)}
    unfused = recipe.model_copy(update={"kernels": recipe.kernels.model_copy(update={"fusions": Fusions()})})
    assert fused - {entry.kernel for entry in ENTRIES if entry.used_by(unfused)} == {
        "gated activation of the experts (Triton)",
        "row map of the permutation (Triton)",
        "permutation of tokens (Triton)",
        "order of local experts (Triton)",
        "router (Triton)",
        "rotary embedding",
        "rotary embedding of multi-latent attention (Triton)",
        "cross entropy",
        "SwiGLU of dense MLPs and shared experts (compiled)",
    }
    original = functional.rms_norm
    with stand_ins(recipe, ignore) as used:
        assert functional.rms_norm is not original
        assert {entry.kernel for entry in used} == fused
    assert functional.rms_norm is original
