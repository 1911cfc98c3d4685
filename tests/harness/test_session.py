"""Every model at smoke scale through the whole harness, and what a session refuses."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from moe_bench.errors import BadInputError, MeasurementError, MissingRequirementError
from moe_bench.harness.mcore_config import megatron_arguments
from moe_bench.harness.session import run
from moe_bench.harness.workers import Seat
from moe_bench.spec.catalogue import recipes_root
from moe_bench.spec.recipe import Recipe
from moe_bench.spec.rendezvous import Rendezvous
from tests.harness.toys import laid_out, parity_recipe, smoke_recipe
from tests.harness.zygote import Zygote

MODELS = sorted(path.parent.name for path in Path(recipes_root()).glob("*/model.yaml"))


@pytest.mark.parametrize("model", MODELS)
def test_every_model_trains_at_smoke_scale(zygote: Zygote, model: str) -> None:
    recipe = smoke_recipe(model)
    outcome = zygote.train(megatron_arguments(recipe))
    samples, num_ranks = outcome.samples, recipe.parallel.num_gpus
    num_warmup, num_timed = recipe.steps.num_warmup, recipe.steps.num_timed
    # untrained weights guess evenly over the vocabulary
    assert samples.losses[0] == pytest.approx(math.log(recipe.model.vocab_size), rel=0.02)
    assert len(samples.losses) == len(samples.grad_norms) == num_warmup + num_timed
    assert [len(times) for times in samples.warmup_step_times_s] == [num_warmup] * num_ranks
    assert [len(times) for times in samples.step_times_s] == [num_timed] * num_ranks
    assert all(time_s > 0 for times in samples.step_times_s for time_s in times)
    assert all(grad_norm > 0 for grad_norm in samples.grad_norms)
    assert len(samples.peak_memory_bytes) == len(outcome.hosts) == num_ranks
    assert min(samples.peak_memory_bytes) > 0
    assert recipe.model.moe is not None
    num_expert_layers = recipe.model.num_layers - recipe.model.num_dense_layers + recipe.num_mtp_layers
    assert [len(layers) for layers in samples.tokens_per_expert] == [num_expert_layers] * num_timed
    if recipe.token_drop is None:
        copies = recipe.tokens_per_step * recipe.model.moe.top_k
        assert {sum(layer) for step in samples.tokens_per_expert for layer in step} == {copies}
    assert samples.implementations.attention == "torch:masked"
    assert samples.implementations.experts == "torch:grouped_mm"
    assert samples.energy_j is None
    assert outcome.gpus == ()


def test_a_loss_that_is_not_finite_ends_the_run_by_name(zygote: Zygote) -> None:
    recipe = parity_recipe("qwen3_30b_a3b")
    runaway = recipe.optimizer.model_copy(update={"learning_rate": 1e30, "clip_grad_norm": 0.0})
    diverging = laid_out(recipe, parallel={"num_gpus": 2, "expert": 2}, optimizer=runaway)
    with pytest.raises(MeasurementError) as caught:
        zygote.train(megatron_arguments(diverging))
    assert re.fullmatch(r"rank \d: (loss|gradient norm) is (nan|inf) in step 2", str(caught.value))


def test_what_megatron_core_refuses_is_told_in_its_words(zygote: Zygote) -> None:
    arguments = megatron_arguments(parity_recipe("qwen3_30b_a3b"))
    recompute: dict[str, Any] = {"recompute_granularity": "selective", "recompute_modules": ("softmax",)}
    odd = dataclasses.replace(arguments, transformer=arguments.transformer | recompute)
    with pytest.raises(BadInputError, match=r"^Megatron-Core refuses the recipe: .*softmax"):
        zygote.train(odd)


def started_rank(port: int, seat: Seat) -> bool:
    """One rank as torchrun or srun starts it: it is told where to meet, and inherits nothing."""
    arguments = megatron_arguments(started_recipe())
    rendezvous = dataclasses.replace(seat.rendezvous, master_port=port)
    outcome = run(arguments, rendezvous=rendezvous, on_report=lambda report: None)
    return outcome is not None and len(outcome.samples.step_times_s) == seat.rendezvous.world_size


def started_recipe() -> Recipe:
    return laid_out(parity_recipe("qwen3_30b_a3b"), parallel={"num_gpus": 2, "pipeline": 2})


def test_of_ranks_that_somebody_started_the_first_reports_for_all(zygote: Zygote) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert zygote.fork(2, functools.partial(started_rank, port)) == [True, False]


def test_a_job_of_another_size_is_refused() -> None:
    arguments = megatron_arguments(parity_recipe("qwen3_30b_a3b"))
    rendezvous = Rendezvous(rank=0, world_size=2, local_rank=0, master_addr="localhost", master_port=1)
    with pytest.raises(MissingRequirementError, match="the recipe needs 1 ranks, 2 were started"):
        run(arguments, rendezvous=rendezvous, on_report=lambda report: None)


def test_gpu_ranks_are_left_to_a_launcher() -> None:
    arguments = megatron_arguments(parity_recipe("qwen3_30b_a3b"))
    on_gpus = dataclasses.replace(arguments, training=arguments.training | {"device": "NVIDIA H100"})
    with pytest.raises(MissingRequirementError, match="GPU ranks need a launcher"):
        run(on_gpus, rendezvous=None, on_report=lambda report: None)
