"""What the libraries that send tokens to experts keep on a GPU for it, outside of torch's allocator.

deepseek-ai/DeepEP, branch hybrid-ep, commit 94a9f8f6 (containers/pins.yaml), as Megatron-Core 0.19.2 asks for
buffers (transformer/moe/fused_a2a.py). Not counted are what NVSHMEM keeps for itself, the granularity of its
heap and of shared allocations, and some kilobytes of flags and of scans over the routing map.
"""

from __future__ import annotations

from moe_bench.analysis.activations import token_counts
from moe_bench.spec.model import MixtureOfExperts
from moe_bench.spec.recipe import HYBRIDEP_DOMAIN, Recipe

NVLINK_PEERS = 8
"""Ranks that DeepEP takes to share NVLink (csrc/kernels/configs.cuh)."""
DEEPEP_NUM_SMS = 20
DEEPEP_WORKSPACE_BYTES = 32 * 2**20
RDMA_TOKENS = 128
"""Tokens received in flight per channel and peer, before they are rounded up to whole sendings."""
_PER_TOKEN_BYTES = 8 + 128 * (8 + 4) + 128 * 4
"""Origin (`SourceMeta`), indices and weights of 128 choices, 128 scales: what a slot has room for."""

_SLOTS = {
    2: (256, 6, 6),
    4: (256, 6, 6),
    8: (256, 6, 6),
    16: (288, 20, 12),
    24: (288, 32, 8),
    32: (288, 32, 8),
    64: (288, 28, 20),
    128: (560, 32, 12),
    144: (720, 12, 8),
    160: (720, 12, 8),
}
"""By number of ranks: tokens received over NVLink, tokens per RDMA sending of dispatch and of combine
(deep_ep/buffer.py, get_dispatch_config and get_combine_config)."""

HYBRIDEP_MIN_TOKENS = 512
HYBRIDEP_CHUNK_TOKENS = 64
HYBRIDEP_SCALE_CHANNELS = 128
"""csrc/hybrid_ep/config.cuh, Configurer."""


def dispatch_buffer_bytes(recipe: Recipe) -> int | None:
    """Buffers of the recipe's dispatcher on one rank; None where no source gives their size (NCCL EP)."""
    moe = recipe.model.moe
    if moe is None or recipe.dispatch.dispatcher in ("allgather", "alltoall"):
        return 0
    num_ranks = recipe.parallel.expert * recipe.parallel.expert_tensor
    if recipe.dispatch.dispatcher == "deepep":
        return deepep_buffer_bytes(
            num_ranks=num_ranks,
            num_sms=recipe.dispatch.num_sms or DEEPEP_NUM_SMS,
            hidden_bytes=2 * recipe.model.hidden_size,
        )
    if recipe.dispatch.dispatcher == "hybridep":
        steps = (moe.on_step(step) for step in (None, *moe.steps))
        return max(_hybridep_buffer_bytes(recipe, each, num_ranks=num_ranks) for each in steps)
    return None


def deepep_buffer_bytes(*, num_ranks: int, num_sms: int, hidden_bytes: int) -> int:
    """Receive slots over NVLink, send and receive slots over RDMA, and a workspace.

    C channels of two SMs, n = min(ranks, 8) peers on NVLink and N = ranks / 8 domains, s slots of a token's h
    bytes and 2,056 more: C n (s (h + 2,056) + 4 (2 N + 3)), and between domains 2 C N (s' (h + 2,072) + 72)
    (csrc/config.hpp, get_nvl_buffer_size_hint and get_rdma_buffer_size_hint; csrc/deep_ep.cpp, Buffer).
    Raises KeyError for a number of ranks that DeepEP has no settings for.
    """
    channels = num_sms // 2
    nvlink_slots, *sendings = _SLOTS[num_ranks]
    peers, domains = min(num_ranks, NVLINK_PEERS), max(1, num_ranks // NVLINK_PEERS)
    per_token = hidden_bytes + _PER_TOKEN_BYTES
    total = DEEPEP_WORKSPACE_BYTES
    total += _aligned(channels * peers * (nvlink_slots * per_token + 4 * (2 * domains + 3)), to=128)
    if num_ranks > NVLINK_PEERS:
        slots = max(_aligned(RDMA_TOKENS, to=sent) for sent in sendings)
        control = 4 * (2 * NVLINK_PEERS + 2)
        total += _aligned(2 * channels * domains * (slots * (per_token + 16) + control), to=128)
    return total


def _hybridep_buffer_bytes(recipe: Recipe, moe: MixtureOfExperts, *, num_ranks: int) -> int:
    """Room for the case that all tokens of all ranks choose this one.

    With t tokens per rank (at least 512, whole chunks of 64), R ranks in each of N NVLink domains, e experts
    per rank: the tokens t R N, each with h bytes, 4 e R of probabilities and 4 H / 128 of scales; flags per
    chunk; the gathered routing maps, (t R N) (e R N); between domains the rank's own tokens with
    probabilities of all experts, and of N - 1 domains three times tokens and probabilities and once scales
    (csrc/hybrid_ep/buffer/intranode.cu, internode_doca.cu, extension/allgather.cu).
    """
    stated = recipe.env.get(HYBRIDEP_DOMAIN)
    in_domain = int(stated) if stated else min(num_ranks, recipe.system.nvlink_domain_gpus)
    domains = num_ranks // in_domain
    experts = moe.num_experts // recipe.parallel.expert
    tokens = _aligned(max(token_counts(recipe).sharded, HYBRIDEP_MIN_TOKENS), to=HYBRIDEP_CHUNK_TOKENS)
    chunks = tokens // HYBRIDEP_CHUNK_TOKENS
    hidden = recipe.model.hidden_size
    token, scales = 2 * hidden, 4 * (hidden // HYBRIDEP_SCALE_CHANNELS)
    probabilities = 4 * experts * in_domain
    everyone = tokens * num_ranks
    total = everyone * (token + probabilities + scales)
    total += 2 * 4 * chunks * num_ranks
    total += everyone * experts * num_ranks
    others = domains - 1
    if others:
        total += tokens * (token + domains * probabilities + scales)
        total += tokens * others * (3 * (token + probabilities) + scales)
        total += 4 * 8 * (chunks + 2) * others
    return total


def _aligned(value: int, *, to: int) -> int:
    return -(-value // to) * to
