"""One rank alone: it trains, holds and receives what a rank of the whole job does, and says what it is."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import distributed

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.loopback import loopback_groups
from moe_bench.harness.mcore_config import megatron_arguments
from moe_bench.harness.rank import build, machine
from moe_bench.harness.session import Outcome, run
from moe_bench.harness.settings import settings_of
from moe_bench.harness.workers import Seat
from moe_bench.results.store import read_records
from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.derive_slice import SliceChoice, tiny_slice_plan
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Recipe, Routing
from moe_bench.spec.rendezvous import Rendezvous
from moe_bench.spec.scale import Plan
from tests.harness.zygote import Zygote

MODELS = sorted(path.parent.name for path in Path(recipes_root()).glob("*/model.yaml"))
BF16, FP32 = 2, 4


def tiny_plan(name: str, choice: SliceChoice | None = None) -> Plan:
    loader = Loader(root=recipes_root())
    asked = loader.recipe(find_recipe(name, loader))
    return tiny_slice_plan(asked, host=loader.system("cpu_host"), modified=(), choice=choice)


def tiny_slice(name: str) -> Recipe:
    return tiny_plan(name).recipe


def trained(plan: Plan) -> Outcome | None:
    arguments = megatron_arguments(plan.recipe)
    return run(arguments, rendezvous=None, on_report=lambda report: None, slice_rank=plan.rank)


def num_copies(recipe: Recipe) -> int:
    """Token copies that one rank routes in a step, in each of its expert layers."""
    assert recipe.model.moe is not None
    num_sharing = recipe.parallel.num_gpus // recipe.parallel.pipeline
    return recipe.tokens_per_step // num_sharing * recipe.model.moe.top_k


@pytest.mark.parametrize("model", [*MODELS, "mixtral_8x22b/h100_sxm_128g_bf16_fsdp"])
def test_one_rank_of_every_model_trains(zygote: Zygote, model: str) -> None:
    plan = tiny_plan(model)
    recipe = plan.recipe
    samples = zygote.call(trained, plan).samples
    assert len(samples.step_times_s) == 1
    # untrained weights guess evenly over the rank's part of the vocabulary, whose sums stay its own, and go
    # on doing so: nothing strange came back from the groups
    guess = math.log(recipe.model.vocab_size / recipe.parallel.tensor)
    is_last = plan.pipeline_rank == recipe.parallel.pipeline - 1
    assert samples.losses == pytest.approx([guess] * 7 if is_last else [], rel=0.05)
    own = [chunk for chunk in recipe.chunks() if chunk.pipeline_rank == plan.pipeline_rank]
    num_expert_layers = sum(
        sum(map(recipe.model.is_moe_layer, chunk.layers)) + chunk.num_mtp_layers for chunk in own
    )
    for step in samples.tokens_per_expert:
        assert len(step) == num_expert_layers >= 1
        assert {sum(layer) for layer in step} == {num_copies(recipe)}
    assert all(num_bytes > 0 for num_bytes in samples.stood_in_bytes.values())
    assert samples.stood_in_bytes or recipe.parallel.num_gpus == 1
    assert samples.alone is not None
    for schedule_s, step_s in zip(samples.alone.schedule_times_s, samples.step_times_s[0], strict=True):
        assert 0 < samples.alone.stand_in_s < schedule_s < step_s


def test_the_last_stage_has_the_loss(zygote: Zygote) -> None:
    plan = tiny_plan("qwen3_235b_a22b", SliceChoice(stage=1))
    parallel = plan.recipe.parallel
    assert (parallel.pipeline, parallel.virtual_pipeline, plan.pipeline_rank) == (2, 2, 1)
    # what comes from the stage before has no meaning, but the guess stays even
    guess = math.log(plan.recipe.model.vocab_size / parallel.tensor)
    assert zygote.call(trained, plan).samples.losses == pytest.approx([guess] * 7, rel=0.05)


def test_a_recording_is_dealt_out_layer_by_layer(zygote: Zygote) -> None:
    """Groups of experts are no limit to it: deepseek_v3 chooses from two groups of four."""
    layers = ((5, 1, 1, 1, 1, 1, 1, 5), (1, 1, 1, 1, 5, 5, 1, 1))
    routing = Routing(mode="recorded", trace=layers)
    plan = tiny_plan("deepseek_v3", SliceChoice(routing=routing))
    recipe = plan.recipe
    samples = zygote.call(trained, plan).samples
    first = sum(map(recipe.model.is_moe_layer, range(recipe.chunks()[plan.pipeline_rank].layers[0])))
    copies = num_copies(recipe)
    for step in samples.tokens_per_expert:
        assert step[0] == tuple(copies * count // 16 for count in layers[first % 2])
        assert step[1] == tuple(copies * count // 16 for count in layers[(first + 1) % 2])


def test_the_exchange_of_tokens_has_the_bytes_of_a_hand_count(zygote: Zygote) -> None:
    plan = tiny_plan("qwen3_30b_a3b")
    recipe = plan.recipe
    moe, parallel = recipe.model.moe, recipe.parallel
    assert moe is not None
    assert (parallel.expert, parallel.tensor, recipe.recompute.granularity) == (2, 1, "none")
    copies = recipe.micro_batch_size * recipe.seq_len * moe.top_k
    # dispatch and combine of BF16 rows, and FP32 probabilities with the dispatch; the same again backward
    per_layer = 2 * (2 * copies * recipe.model.hidden_size * BF16 + copies * FP32)
    found = zygote.call(trained, plan).samples.stood_in_bytes
    assert found["all_to_all EP"] == per_layer * recipe.model.num_layers * recipe.num_micro_batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a rank built and saw."""

    num_local_experts: tuple[int, ...]
    num_received_tokens: tuple[int, ...]


def held(recipe: Recipe, seat: Seat) -> Held:
    """Build the rank and pass one micro batch through its first expert layer."""
    arguments = megatron_arguments(recipe)
    settings = settings_of(arguments)
    with (
        machine(settings, seat.rendezvous),
        loopback_groups(
            world_size=settings.world_size,
            rank=0,
            sizes=arguments.parallel_state,
            on_transfer=lambda transfer: None,
        ),
    ):
        built = build(arguments, settings, device="cpu")
        layers = [
            module for chunk in built.chunks for module in chunk.modules() if isinstance(module, MoELayer)
        ]
        received: list[torch.Tensor] = []
        layers[0].experts.register_forward_pre_hook(lambda module, inputs: received.append(inputs[1]))
        shape = (recipe.seq_len, recipe.micro_batch_size, recipe.model.hidden_size)
        layers[0](torch.randn(shape, dtype=torch.bfloat16))
        return Held(
            num_local_experts=tuple(layer.num_local_experts for layer in layers),
            num_received_tokens=tuple(received[0].tolist()),
        )


def test_a_rank_holds_its_experts_and_they_receive_their_share_of_all_ranks_tokens(zygote: Zygote) -> None:
    recipe = tiny_slice("qwen3_30b_a3b")
    moe, num_ranks = recipe.model.moe, recipe.parallel.expert
    assert moe is not None
    (found,) = zygote.fork(1, partial(held, recipe))
    num_local = moe.num_experts // num_ranks
    assert found.num_local_experts == (num_local,) * recipe.model.num_layers
    share = num_ranks * recipe.micro_batch_size * recipe.seq_len * moe.top_k // moe.num_experts
    assert found.num_received_tokens == (share,) * num_local


def gathered_in_place(seat: Seat) -> list[float]:
    """A buffer whose second part is this rank's, gathered as the distributed optimizer gathers weights."""
    with loopback_groups(
        world_size=2,
        rank=1,
        sizes=megatron_arguments(tiny_slice("qwen3_30b_a3b")).parallel_state,
        on_transfer=lambda transfer: None,
    ):
        buffer = torch.tensor([1.0, 2.0, 3.0, 4.0])
        distributed.all_gather_into_tensor(buffer, buffer[2:])
        found: list[float] = buffer.tolist()
        return found


def test_weights_of_other_ranks_stay_what_they_were(zygote: Zygote) -> None:
    assert zygote.fork(1, gathered_in_place) == [[1.0, 2.0, 3.0, 4.0]]


def test_a_slice_in_several_processes_is_refused() -> None:
    two = Rendezvous(rank=0, world_size=2, local_rank=0, master_addr="localhost", master_port=1)
    arguments = megatron_arguments(tiny_slice("qwen3_30b_a3b"))
    with pytest.raises(MissingRequirementError, match="a slice is one rank, 2 were started"):
        run(arguments, rendezvous=two, on_report=lambda report: None, slice_rank=0)


def test_the_command_writes_a_record_that_carries_its_mark(tmp_path: Path) -> None:
    command = ["run", "qwen3_30b_a3b", "--scale", "tiny_slice", "--dryrun", "--out", str(tmp_path), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "moe_bench", *command], capture_output=True, text=True, check=True
    )
    shown: dict[str, Any] = json.loads(done.stdout)
    (record,) = read_records((tmp_path,))
    assert (record.plan.scale, record.plan.is_slice, record.num_ranks) == ("tiny_slice", True, 1)
    assert (shown["scale"], shown["is_compute_of_one_rank"]) == ("tiny_slice", True)
    # the closed form knows the torch-native kernels of the dry run (tests/harness/test_closed_forms.py)
    peaks = [shown["slice"][name] for name in ("closed_form_peak_bytes", "dry_run_peak_bytes")]
    assert peaks[0] == pytest.approx(peaks[1], rel=0.1)
    assert Path(shown["record"]).parent.name.endswith("_tiny_slice")
