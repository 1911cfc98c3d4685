"""What each way to carry tokens to their experts asks for."""

from __future__ import annotations

from collections.abc import Iterator

from moe_bench.spec.legality.rule import Found, nearest_divisor, nearest_multiples, rule
from moe_bench.spec.recipe import HYBRIDEP_DOMAIN, Recipe

_DISPATCHER = "megatron/core/transformer/moe/token_dispatcher.py"
_CONFIG = "megatron/core/transformer/transformer_config.py"
_DEEPEP = "DeepEP 94a9f8f6"

FLEX = ("deepep", "hybridep", "ncclep")
"""Backends of Megatron-Core's flex dispatcher."""

DEEPEP_GROUPS = (2, 4, 8, 16, 24, 32, 64, 128, 144, 160)
DEEPEP_MAX_TOP_K = 32
DEEPEP_NVLINK_PEERS = 8
DEEPEP_WARP_BYTES = 16384
"""Shared memory of a warp between nodes; within one, a warp has half of it and moves half a token."""
HYBRIDEP_MAX_DOMAIN = 72
HYBRIDEP_MAX_TOKENS = 21844
"""Between domains: 3 x tokens + 1 entries stay below 65,536 of a queue pair (csrc/hybrid_ep/config.cuh)."""


@rule("it runs on NVLink and RDMA of GPUs", _DEEPEP)
def dispatcher_needs_gpus(recipe: Recipe) -> Iterator[Found]:
    if recipe.system.gpu is None and recipe.dispatch.dispatcher in FLEX:
        yield (
            "dispatch.dispatcher",
            f"{recipe.dispatch.dispatcher} on {recipe.system.key}, which has no GPU",
            "use alltoall",
        )


@rule(
    "that dispatcher permutes with Transformer Engine",
    f"{_DISPATCHER}:1431",
    "moe_bench/harness/kernels/fused/dispatchers.py",
)
def flex_permutation(recipe: Recipe) -> Iterator[Found]:
    kernels, dispatcher = recipe.kernels, recipe.dispatch.dispatcher
    if _is_flex(recipe, *FLEX) and kernels.is_torch_native and kernels.fusions.permute:
        yield "kernels.fusions.permute", f"true with {kernels.family} and {dispatcher}", "write false"


@rule(
    "there is nobody to exchange tokens with",
    f"{_DISPATCHER}:1770",
    f"{_DISPATCHER}:1788",
)
def flex_group_of_one(recipe: Recipe) -> Iterator[Found]:
    if _is_flex(recipe, "deepep", "ncclep") and _group(recipe) == 1:
        yield "dispatch.dispatcher", f"{recipe.dispatch.dispatcher} with ETP1 x EP1", "use alltoall"


@rule(
    "it carries FP32 probabilities; others Megatron-Core would convert without stopping",
    f"{_DISPATCHER}:1430",
)
def fp32_probabilities(recipe: Recipe) -> Iterator[Found]:
    if _is_flex(recipe, *FLEX) and recipe.dispatch.router_dtype != "fp32":
        yield (
            "dispatch.router_dtype",
            f"{recipe.dispatch.router_dtype or 'null'} with {recipe.dispatch.dispatcher}",
            "write fp32",
        )


@rule("DeepEP has settings for these numbers of ranks only", f"{_DEEPEP}, deep_ep/buffer.py:252")
def deepep_group(recipe: Recipe) -> Iterator[Found]:
    group = _group(recipe)
    if _is_flex(recipe, "deepep") and group > 1 and group not in DEEPEP_GROUPS:
        nearest = max(size for size in DEEPEP_GROUPS if size <= group)
        yield (
            "parallel.expert",
            f"ETP{recipe.parallel.expert_tensor} x EP{recipe.parallel.expert} = {group} ranks, DeepEP knows "
            f"{', '.join(str(size) for size in DEEPEP_GROUPS)}",
            f"use EP{max(1, nearest // recipe.parallel.expert_tensor)}",
        )


@rule("eight neighbouring ranks share an NVLink domain", f"{_DEEPEP}, csrc/deep_ep.cpp:153")
def deepep_nvlink_peers(recipe: Recipe) -> Iterator[Found]:
    if not _is_flex(recipe, "deepep") or recipe.system.gpu is None:
        return
    peers = min(_group(recipe), DEEPEP_NVLINK_PEERS)
    if recipe.system.nvlink_domain_gpus % peers:
        yield (
            "dispatch.dispatcher",
            f"deepep in groups of {peers}, {recipe.system.nvlink_domain_gpus} GPUs per NVLink domain",
            "use alltoall",
        )


@rule(
    "a warp's 32 lanes hold the experts of a token, each once per tensor rank",
    f"{_DEEPEP}, csrc/kernels/internode.cu:408",
)
def deepep_top_k(recipe: Recipe) -> Iterator[Found]:
    moe = recipe.model.moe
    if moe is None or not _is_flex(recipe, "deepep"):
        return
    carried = moe.top_k * recipe.parallel.expert_tensor
    if carried > DEEPEP_MAX_TOP_K:
        yield (
            "parallel.expert_tensor",
            f"top-{moe.top_k} x ETP{recipe.parallel.expert_tensor} = {carried} entries per token, "
            f"{DEEPEP_MAX_TOP_K} fit",
            f"use ETP{nearest_divisor(recipe.parallel.expert_tensor, max(1, DEEPEP_MAX_TOP_K // moe.top_k))}",
        )


@rule(
    "a token travels in 16-byte words, in two halves, and fits a warp's buffer",
    f"{_DEEPEP}, csrc/kernels/intranode.cu:236",
)
def deepep_hidden_size(recipe: Recipe) -> Iterator[Found]:
    moe, hidden = recipe.model.moe, recipe.model.hidden_size
    if moe is None or not _is_flex(recipe, "deepep"):
        return
    barrier, source = 8, 8
    beside = 2 * barrier
    if _group(recipe) > DEEPEP_NVLINK_PEERS:
        # csrc/kernels/internode.cu:43: with each token its source, and index and weight of each expert
        beside = barrier + source + 8 * moe.top_k * recipe.parallel.expert_tensor
    largest = (DEEPEP_WARP_BYTES - beside) // 2 // 16 * 16
    if hidden % 16 or hidden > largest:
        yield (
            "dispatch.dispatcher",
            f"deepep with hidden_size {hidden}, not a multiple of 16 up to {largest}",
            "use alltoall",
        )


@rule("half of them send, half receive", f"{_DEEPEP}, deep_ep/buffer.py:160")
def deepep_sms(recipe: Recipe) -> Iterator[Found]:
    num_sms = recipe.dispatch.num_sms
    if _is_flex(recipe, "deepep") and num_sms is not None and num_sms % 2:
        yield "dispatch.num_sms", f"{num_sms} with deepep", f"use {num_sms + 1}"


@rule("the GPU has no more", "the system's datasheet")
def num_sms(recipe: Recipe) -> Iterator[Found]:
    gpu, wanted = recipe.system.gpu, recipe.dispatch.num_sms
    if gpu is not None and wanted is not None and wanted > gpu.num_sms:
        yield (
            "dispatch.num_sms",
            f"{wanted}, {gpu.device_name} has {gpu.num_sms}",
            f"use at most {gpu.num_sms}",
        )


@rule("DeepEP marks dropped tokens and does not pad", f"{_CONFIG}:1604")
def deepep_padding(recipe: Recipe) -> Iterator[Found]:
    if _is_flex(recipe, "deepep") and recipe.token_drop is not None and recipe.token_drop.pad_to_capacity:
        yield "token_drop.pad_to_capacity", "true with deepep", "write false, or use alltoall"


@rule("the expert group is whole NVLink domains", f"{_DEEPEP}, deep_ep/hybrid_ep_buffer.py:74")
def hybridep_domains(recipe: Recipe) -> Iterator[Found]:
    if not _is_flex(recipe, "hybridep") or recipe.system.gpu is None:
        return
    group, limit = _group(recipe), min(recipe.system.nvlink_domain_gpus, HYBRIDEP_MAX_DOMAIN)
    domain, key = _hybridep_domain(recipe), f"env.{HYBRIDEP_DOMAIN}"
    if domain is None:
        yield key, "not a positive number", f"write '{min(group, limit)}'"
    elif domain > limit:
        yield key, f"{domain}, {recipe.system.key} has {limit}", f"write '{nearest_divisor(group, limit)}'"
    elif group % domain and HYBRIDEP_DOMAIN in recipe.env:
        yield key, f"{domain}, expert group of {group}", f"write '{nearest_divisor(group, limit)}'"
    elif group % domain:
        yield (
            "parallel.expert",
            f"expert group of {group}, {domain} ranks per NVLink domain",
            f"use groups of {nearest_multiples(group, domain)}",
        )


@rule("between domains a queue pair holds no more requests", f"{_DEEPEP}, csrc/hybrid_ep/config.cuh")
def hybridep_tokens(recipe: Recipe) -> Iterator[Found]:
    domain = _hybridep_domain(recipe)
    if not _is_flex(recipe, "hybridep") or domain is None or _group(recipe) <= domain:
        return
    num_tokens = _tokens_per_rank(recipe)
    if num_tokens > HYBRIDEP_MAX_TOKENS:
        yield (
            "micro_batch_size",
            f"{num_tokens} tokens per rank between NVLink domains, HybridEP takes {HYBRIDEP_MAX_TOKENS}",
            "lower it, or raise parallel.context",
        )


@rule(
    "copies move four experts' flags and sixteen channels at a time", f"{_DEEPEP}, csrc/hybrid_ep/config.cuh"
)
def hybridep_alignment(recipe: Recipe) -> Iterator[Found]:
    moe, domain = recipe.model.moe, _hybridep_domain(recipe)
    if moe is None or domain is None or not _is_flex(recipe, "hybridep"):
        return
    per_domain = moe.num_experts // recipe.parallel.expert * domain
    if per_domain % 4 or recipe.model.hidden_size % 16:
        yield (
            "dispatch.dispatcher",
            f"hybridep with {per_domain} experts per domain and hidden_size {recipe.model.hidden_size}",
            "use alltoall",
        )


@rule("the receive buffer has a fixed size", f"{_DISPATCHER}:1564")
def ncclep_capacity(recipe: Recipe) -> Iterator[Found]:
    if _is_flex(recipe, "ncclep") and recipe.mcore.get("moe_expert_rank_capacity_factor") is None:
        yield (
            "mcore.moe_expert_rank_capacity_factor",
            "missing with ncclep",
            "write one, such as 1.5",
        )


@rule("only HybridEP and NCCL EP keep a budget per rank", f"{_CONFIG}:1694", f"{_CONFIG}:1702")
def rank_capacity(recipe: Recipe) -> Iterator[Found]:
    key = "mcore.moe_expert_rank_capacity_factor"
    if recipe.mcore.get("moe_expert_rank_capacity_factor") is None or recipe.model.moe is None:
        return
    if not _is_flex(recipe, "hybridep", "ncclep"):
        yield key, f"set with {recipe.dispatch.dispatcher}", "remove it, or use hybridep"
    elif recipe.dispatch.dispatcher == "hybridep" and not recipe.kernels.op_fuser:
        yield key, "set with hybridep and without kernels.op_fuser", "write op_fuser: true"


@rule("the all-gather dispatcher cannot pad the tokens of an expert", f"{_CONFIG}:2323")
def allgather_padding(recipe: Recipe) -> Iterator[Found]:
    low = recipe.low_precision
    if recipe.model.moe is None or recipe.dispatch.dispatcher != "allgather" or low is None:
        return
    if low.pad_routing_map and recipe.precision not in ("fp32", "bf16"):
        yield "low_precision.pad_routing_map", "true with allgather", "write false, or use alltoall"


RULES = (
    dispatcher_needs_gpus, flex_permutation, flex_group_of_one, fp32_probabilities, deepep_group,
    deepep_nvlink_peers, deepep_top_k, deepep_hidden_size, deepep_sms, num_sms, deepep_padding,
    hybridep_domains, hybridep_tokens, hybridep_alignment, ncclep_capacity, rank_capacity, allgather_padding,
)  # fmt: skip


def _is_flex(recipe: Recipe, *backends: str) -> bool:
    return recipe.model.moe is not None and recipe.dispatch.dispatcher in backends


def _group(recipe: Recipe) -> int:
    """Ranks among which the tokens of an expert layer travel."""
    return recipe.parallel.expert * recipe.parallel.expert_tensor


def _hybridep_domain(recipe: Recipe) -> int | None:
    """Ranks of the expert group in one NVLink domain: stated, or as HybridEP finds it; None if unreadable."""
    stated = recipe.env.get(HYBRIDEP_DOMAIN)
    if stated is None:
        return min(_group(recipe), recipe.system.nvlink_domain_gpus)
    return int(stated) if stated.isdecimal() and int(stated) > 0 else None


def _tokens_per_rank(recipe: Recipe) -> int:
    parallel = recipe.parallel
    ranks = parallel.context * (parallel.tensor if parallel.sequence_parallel else 1)
    return recipe.micro_batch_size * recipe.seq_len // ranks
