"""Chunks in flight by hand and by the schedule's own formula, and what stands beside them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_bench.analysis.chunk_memory import ChunkMemory, ModelMemory
from moe_bench.analysis.schedule_memory import StepPeak, step_peak
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.pipeline import pipeline_chunks
from moe_bench.spec.recipe import KernelSpec, Overlap, Recipe, Recompute
from tests.analysis.conftest import RecipeMaker

VECTOR = 2 * 4096 * 4096
"""a t H of Mixtral-8x7B at 4,096 tokens."""
TORCH = KernelSpec(family="torch_native")


def of_rank(recipe: Recipe, rank: int) -> tuple[list[ChunkMemory], StepPeak]:
    model = ModelMemory(recipe)
    chunks = [
        model.chunk(chunk)
        for chunk in pipeline_chunks(recipe.parallel, num_layers=recipe.model.num_layers, num_mtp_layers=0)
        if chunk.pipeline_rank == rank
    ]
    return chunks, step_peak(recipe, chunks, vector_bytes=model.sizes.vector_bytes)


@pytest.mark.parametrize(
    ("rank", "num_micro_batches", "in_flight"), [(0, 16, 4), (1, 16, 3), (3, 16, 1), (0, 2, 2)]
)
def test_1f1b_holds_as_many_micro_batches_as_stages_follow(
    models: dict[str, ModelSpec],
    make_recipe: RecipeMaker,
    rank: int,
    num_micro_batches: int,
    in_flight: int,
) -> None:
    parallel = ParallelSpec(num_gpus=32, pipeline=4, expert=8)
    recipe = make_recipe(
        models["mixtral_8x7b"], parallel, kernels=TORCH, global_batch_size=num_micro_batches * parallel.data
    )
    (chunk,), peak = of_rank(recipe, rank)
    fullest = max(chunk.forward.total_bytes, chunk.first_backward.total_bytes)
    beside = peak.total_bytes - (in_flight - 1) * chunk.kept_bytes - fullest
    # at most the input and gradient that the last backward pass has left, and the next output's gradient
    assert beside in {0, VECTOR, 2 * VECTOR, 3 * VECTOR}


def test_the_inputs_of_micro_batches_in_flight_come_from_the_neighbour(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    recipe = make_recipe(
        models["mixtral_8x7b"], ParallelSpec(num_gpus=32, pipeline=4, expert=8), kernels=TORCH
    )
    # three in flight and the gradient of an output, going forward also the input of the last one through
    assert of_rank(recipe, 1)[1].pipeline_bytes in {4 * VECTOR, 5 * VECTOR}
    # an embedding on the first rank, which receives gradients alone
    assert of_rank(recipe, 0)[1].pipeline_bytes == VECTOR
    assert of_rank(recipe, 3)[1].pipeline_bytes in {VECTOR, 2 * VECTOR}


@given(
    num_groups=st.integers(1, 6),
    pipeline=st.sampled_from((2, 4, 8)),
    num_chunks=st.sampled_from((2, 4)),
    is_overlapped=st.booleans(),
    data=st.data(),
)
def test_interleaved_chunks_in_flight_follow_the_closed_form(
    models: dict[str, ModelSpec],
    make_recipe: RecipeMaker,
    num_groups: int,
    pipeline: int,
    num_chunks: int,
    is_overlapped: bool,
    data: st.DataObject,
) -> None:
    rank = data.draw(st.integers(1, pipeline - 1))
    model = models["mixtral_8x7b"].model_copy(update={"num_layers": pipeline * num_chunks})
    parallel = ParallelSpec(num_gpus=8 * pipeline, pipeline=pipeline, virtual_pipeline=num_chunks, expert=8)
    num_micro_batches = num_groups * pipeline
    recipe = make_recipe(
        model,
        parallel,
        kernels=TORCH,
        global_batch_size=num_micro_batches * parallel.data,
        overlap=Overlap(expert_parallel=is_overlapped),
    )
    chunks, peak = of_rank(recipe, rank)
    # overlap warms up with one pass more, but from then on a pass comes as another goes
    num_warmup = 2 * (pipeline - rank - 1) + (num_chunks - 1) * pipeline
    num_in_flight = min(num_micro_batches * num_chunks, num_warmup + 1)
    layer_bytes = chunks[0].kept_bytes
    most = max(chunk.forward.total_bytes + chunk.backward.total_bytes for chunk in chunks)
    assert (num_in_flight - 1) * layer_bytes < peak.total_bytes
    assert peak.total_bytes < (num_in_flight + 1) * layer_bytes + most + 6 * num_chunks * VECTOR


def test_what_lingers_of_recomputed_layers_grows_as_a_backward_pass_goes_on(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    full = Recompute(granularity="full", num_layers=1)
    recipe = make_recipe(
        models["mixtral_8x7b"], ParallelSpec(num_gpus=8, expert=8), kernels=TORCH, recompute=full
    )
    (chunk,), _ = of_rank(recipe, 0)
    assert chunk.kept_bytes > 32 * VECTOR
    # 31 layers' gradients stand when the first layer's backward pass runs; their inputs have not gone
    first_layer = chunk.pieces[0].backward.total_bytes
    assert chunk.first_backward.total_bytes >= first_layer + 31 * 2 * VECTOR


def test_layers_recomputed_in_pairs_keep_half_the_inputs_and_bring_back_twice_as_much(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    parallel = ParallelSpec(num_gpus=8, expert=8)
    one, two = (
        of_rank(
            make_recipe(
                models["mixtral_8x7b"],
                parallel,
                kernels=TORCH,
                recompute=Recompute(granularity="full", num_layers=number),
            ),
            0,
        )[0][0]
        for number in (1, 2)
    )
    assert one.kept_bytes - two.kept_bytes == 16 * VECTOR
    assert len(one.pieces) - len(two.pieces) == 16
    brought_back = (chunk.pieces[0].backward.held.recomputed_bytes for chunk in (one, two))
    assert next(brought_back) * 1.5 < next(brought_back)
