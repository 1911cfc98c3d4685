"""Context-parallel traffic is priced by how it travels: a ring beside attention, all else before it."""

import pytest

from moe_bench.analysis.collectives import Collective, Group
from moe_bench.projection.constants import Constants
from moe_bench.projection.fabric import Fabric
from moe_bench.projection.step import project
from moe_bench.spec.recipe import Recipe
from tests.projection.search_spaces import LOADER

LEAK = 0.15


def over_context_ranks(comm: str) -> Recipe:
    """Sequences so long that attention hides any ring: CP8 inside a node, no pipeline."""
    changes = (
        "parallel.num_gpus=8", "parallel.context=8", f"parallel.context_comm={comm}", "parallel.tensor=1",
        "parallel.sequence_parallel=false", "parallel.pipeline=1", "parallel.virtual_pipeline=1",
        "parallel.layout=null", "parallel.expert=8", "seq_len=262144", "global_batch_size=4",
        "micro_batch_size=1", "env.CUDA_DEVICE_MAX_CONNECTIONS='1'", "overlap.p2p=false",
    )  # fmt: skip
    return LOADER.recipe(LOADER.root / "mixtral_8x7b/h100_sxm_64g_bf16.yaml", changes=changes)


def context_seconds(recipe: Recipe) -> float:
    terms = {term.name: term.seconds for term in project(recipe).terms}
    return terms["context parallel"]


def priced_s(recipe: Recipe, op: Collective, num_bytes: int) -> float:
    time = Fabric(recipe.system, recipe.parallel).time(op, Group.CONTEXT, num_bytes)
    return time.nvlink_s / Constants().nvlink_fraction + time.latency_s


def test_a_ring_hides_beside_attention_and_a_gather_does_not() -> None:
    ring, gathered = over_context_ranks("p2p"), over_context_ranks("allgather")
    attention = ring.model.attention
    assert attention.kind == "gqa"
    tokens = ring.seq_len // 8
    half = 2 * tokens * attention.num_query_groups * attention.head_dim
    passes = ring.model.num_layers * ring.num_micro_batches
    # seven hops of keys and values forward, twice as many backward, all but the leak hidden
    hops_s = 3 * 7 * priced_s(ring, Collective.SEND, 2 * half)
    assert context_seconds(ring) == pytest.approx(LEAK * passes * hops_s, rel=1e-9)
    # keys and values gathered forward and again backward, and their gradients scattered
    gathers_s = 2 * 3 * priced_s(gathered, Collective.ALL_GATHER, 8 * half)
    assert context_seconds(gathered) == pytest.approx(passes * gathers_s, rel=1e-9)


def test_an_all_to_all_is_waited_for_and_leaves_attention_whole_sequences() -> None:
    exchanged, ring = over_context_ranks("a2a"), over_context_ranks("p2p")
    attention = exchanged.model.attention
    assert attention.kind == "gqa"
    tokens = exchanged.seq_len // 8
    queries = 2 * tokens * attention.num_heads * attention.head_dim
    keys = 2 * tokens * attention.num_query_groups * attention.head_dim
    one_way_s = 2 * sum(priced_s(exchanged, Collective.ALL_TO_ALL, size) for size in (queries, keys))
    passes = exchanged.model.num_layers * exchanged.num_micro_batches
    assert context_seconds(exchanged) == pytest.approx(passes * 2 * one_way_s, rel=1e-9)
    core = [
        next(term.seconds for term in project(one).terms if term.name == "attention")
        for one in (exchanged, ring)
    ]
    assert core[0] < core[1]
