"""Copies of offloaded layers: their bytes and seconds by hand, and what the passes of a micro batch hide."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_bench.projection.host_link import host_traffic, offloaded_bytes
from moe_bench.projection.rows.inference import InferredRun, infer
from moe_bench.projection.step import Projection, project
from moe_bench.projection.work.traits import MEGATRON
from moe_bench.spec.recipe import Offload, Recipe
from tests.projection.published_rows import CATALOGUE, ROWS

MISBOUND = replace(MEGATRON, is_bound_to_first_cpu=True)


def llama3_70b_on_gb300() -> Recipe:
    """Two sequences of 8,192 tokens per micro batch, 20 of 80 layers offloaded."""
    name = "mb25.11-llama3-70b-gb300-64gpu-fp8-current-scaling-s8192"
    run = infer(next(row for row in ROWS if row.id == name), CATALOGUE)
    assert isinstance(run, InferredRun)
    return run.recipe


RECIPE = llama3_70b_on_gb300()
RESIDENT = RECIPE.model_copy(update={"offload": Offload()})


def copies_s(made: Projection) -> float:
    return sum(term.seconds for term in made.terms if term.name == "offloaded activations")


def test_a_layer_sends_what_it_keeps_for_its_gradients() -> None:
    tokens, hidden, key_value, ffn, num_heads = 2 * 8192, 8192, 1024, 28_672, 64
    residuals = 2 * 2 * hidden
    inputs = 3 * hidden + ffn  # of the four products, in FP8
    attention = 2 * (hidden + 2 * key_value) + 2 * hidden + 4 * num_heads  # and the sums of its softmax
    halves = 2 * 2 * ffn
    assert offloaded_bytes(RECIPE) == 20 * tokens * (residuals + inputs + attention + halves)


def test_seconds_are_bytes_over_the_slowest_link() -> None:
    num_bytes = offloaded_bytes(RECIPE)
    near, far = host_traffic(RECIPE, MEGATRON), host_traffic(RECIPE, MISBOUND)
    assert (near.to_host_s, near.from_host_s) == (num_bytes / 182e9, num_bytes / 170e9)
    assert (far.to_host_s, far.from_host_s) == (num_bytes / 55e9, num_bytes / 55e9)
    assert host_traffic(RESIDENT, MISBOUND).to_host_s == 0


def test_copies_that_fit_behind_the_passes_cost_nothing() -> None:
    near = project(RECIPE)
    assert copies_s(near) == 0
    assert near.step_s == project(RESIDENT).step_s


def test_what_the_passes_do_not_hide_is_waited_for_in_every_micro_batch() -> None:
    far = project(RECIPE, traits=MISBOUND)
    traffic = host_traffic(RECIPE, MISBOUND)
    assert 0 < copies_s(far) < RECIPE.num_micro_batches * (traffic.to_host_s + traffic.from_host_s)
    assert far.step_s == pytest.approx(sum(term.seconds for term in far.terms), rel=1e-9)
