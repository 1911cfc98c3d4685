"""Memory under other schedules: their order decides what is in flight, their placement what is held."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_bench.analysis.chunk_memory import ModelMemory
from moe_bench.analysis.memory import memory_fit
from moe_bench.analysis.params import rank_params
from moe_bench.projection.schedule.choice import schedule_shape
from moe_bench.projection.schedule.memory import order_peak, schedule_memory
from moe_bench.projection.schedule.placement import placed
from moe_bench.projection.schedule.shape import Pass, PassKind, ScheduleKind
from moe_bench.projection.schedule.whatif import what_if_order
from moe_bench.projection.step_work import step_work
from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.load import Loader

LOADER = Loader(root=recipes_root(), rules=())
RECIPE = LOADER.recipe(find_recipe("deepseek_v3/h100_sxm_1024g_bf16_pp8_vpp2", LOADER))
PLAIN = LOADER.recipe(
    find_recipe("qwen3_30b_a3b", LOADER),
    changes=("parallel.pipeline=4", "parallel.virtual_pipeline=1", "parallel.num_gpus=32"),
)
F, B, D, W = PassKind.FORWARD, PassKind.BACKWARD, PassKind.DGRAD, PassKind.WGRAD


def test_a_v_holds_the_first_and_the_last_chunk_on_its_first_rank() -> None:
    own = placed(RECIPE, ScheduleKind.DUAL_PIPE_V)
    ranks = RECIPE.parallel.pipeline
    assert [chunk.pipeline_rank for chunk in own.chunks()] == [*range(ranks), *reversed(range(ranks))]
    assert own.name == RECIPE.name
    whole, moved = ([rank_params(one, rank) for rank in range(ranks)] for one in (RECIPE, own))
    assert sum(one.dense + one.expert for one in moved) == sum(one.dense + one.expert for one in whole)
    assert moved[0].dense > whole[0].dense  # embedding and LM head both


def test_schedules_without_another_placement_leave_the_recipe_as_it_is() -> None:
    assert placed(PLAIN, ScheduleKind.ZERO_BUBBLE_H1) is PLAIN


def test_the_work_of_a_step_stands_where_the_schedule_places_it() -> None:
    work = step_work(RECIPE, schedule=ScheduleKind.DUAL_PIPE_V)
    (loss,) = [chunk for chunk in work.lowered.chunks if chunk.has_loss]
    assert loss.pipeline_rank == 0
    assert work.recipe.chunks() == placed(RECIPE, ScheduleKind.DUAL_PIPE_V).chunks()


def test_traffic_and_optimizer_are_those_of_the_rank_that_the_placement_fills_most() -> None:
    """Ranks of equally many layers: a V puts embedding and LM head on one, interleaving on two."""
    sizes = {"num_gpus": 16, "pipeline": 2, "virtual_pipeline": 2, "expert": 8}
    changes = tuple(f"parallel.{name}={size}" for name, size in sizes.items())
    small = LOADER.recipe(find_recipe("qwen3_30b_a3b", LOADER), changes=changes)
    own, other = step_work(small), step_work(small, schedule=ScheduleKind.ZERO_BUBBLE_V)
    assert other.optimizer_memory_s > own.optimizer_memory_s
    assert sum(one.nvlink_s for one in other.gradients.times) > sum(
        one.nvlink_s for one in own.gradients.times
    )


def test_activations_stay_from_the_forward_pass_to_the_weight_gradient() -> None:
    model = ModelMemory(PLAIN)
    chunk = model.chunk(PLAIN.chunks()[1])
    vector = model.sizes.vector_bytes

    def peak(*kinds: PassKind) -> int:
        order = [(Pass(kind, 1, 0),) for kind in kinds]
        return order_peak(order, {1: chunk}, vector_bytes=vector).total_bytes

    once = max(chunk.forward.total_bytes, chunk.backward.total_bytes)
    assert peak(F, B) == once
    assert peak(F, D, W) == once
    assert peak(F, B, F, B) == once
    assert peak(F, D, F, W, D, W) == once + chunk.kept_bytes
    assert peak(F, F, B, B) == once + chunk.kept_bytes


def test_zero_bubble_h1_holds_on_every_rank_what_one_f_one_b_holds_on_the_first() -> None:
    """arXiv:2401.10241: it delays weight gradients as far as the memory of the first rank of 1F1B allows."""
    model = ModelMemory(PLAIN)
    shape = schedule_shape(PLAIN, ScheduleKind.ZERO_BUBBLE_H1)
    chunk = replace(model.chunk(PLAIN.chunks()[1]))
    for rank in range(shape.num_ranks):
        order = what_if_order(shape, rank)
        peak = order_peak(order, {rank: chunk}, vector_bytes=model.sizes.vector_bytes).total_bytes
        assert peak <= chunk.kept_bytes * (shape.num_ranks - 1) + max(
            chunk.forward.total_bytes, chunk.backward.total_bytes
        )


def test_a_v_evens_out_the_activations_of_its_ranks() -> None:
    """2 PP chunks in flight on every rank, where interleaving has most on the first."""
    own = memory_fit(RECIPE, load=1.0)
    other = schedule_memory(RECIPE, ScheduleKind.ZERO_BUBBLE_V, load=1.0)
    inner = slice(1, RECIPE.parallel.pipeline - 1)

    def spread(values: list[int]) -> float:
        return max(values) / min(values)

    assert spread([rank.activations_bytes for rank in other.ranks[inner]]) < spread(
        [rank.activations_bytes for rank in own.ranks[inner]]
    )


@pytest.mark.parametrize("kind", [ScheduleKind.ONE_F_ONE_B, ScheduleKind.ZERO_BUBBLE_H1])
def test_states_are_those_of_the_recipe_where_chunks_do_not_move(kind: ScheduleKind) -> None:
    own, other = memory_fit(PLAIN, load=1.0), schedule_memory(PLAIN, kind, load=1.0)
    assert [rank.states_bytes for rank in other.ranks] == [rank.states_bytes for rank in own.ranks]
