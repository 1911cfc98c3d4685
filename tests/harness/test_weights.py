"""Initial weights: functions of a parameter's name, and an error where one has none."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from moe_bench.harness.build import model_chunks, set_seeds, transformer_config
from moe_bench.harness.host_device import host_device
from moe_bench.harness.mcore_config import megatron_arguments
from moe_bench.harness.patches import patches
from moe_bench.harness.process_groups import process_groups
from moe_bench.harness.rank import joined, wanted_patches
from moe_bench.harness.settings import settings_of
from moe_bench.harness.weights import initialise_by_name, nudge_by_name, sharded_tensors
from moe_bench.harness.workers import Seat
from tests.harness.toys import laid_out, parity_recipe
from tests.harness.zygote import Zygote


class Forgetful(torch.nn.Module):
    """A model that leaves a parameter out of its sharded state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.kept_back = torch.nn.Parameter(torch.zeros(3))

    def sharded_state_dict(self, metadata: object) -> dict[str, object]:
        return {}


def drawn_twice(seat: Seat) -> dict[str, Any]:
    arguments = megatron_arguments(parity_recipe("deepseek_v3"))
    settings = settings_of(arguments)
    with (
        host_device(),
        patches(wanted_patches(settings)),
        process_groups(
            seat.rendezvous, backend="gloo", sizes=arguments.parallel_state, listen_fd=seat.listen_fd
        ),
    ):
        config = transformer_config(arguments)
        drawn: list[dict[str, torch.Tensor]] = []
        for seed in (1, 2, 1):
            set_seeds(settings.seed + len(drawn))
            chunks = model_chunks(arguments, settings, config, device="cpu")
            initialise_by_name(chunks, std=0.05, seed=seed)
            drawn.append({name: value.detach() for name, value in chunks[0].named_parameters()})
        first, other, again = drawn
        norms = [value for name, value in first.items() if name.endswith(("norm.weight", "_norm_weight"))]
        matrices = [value for value in first.values() if value.dim() > 1]
        failure = ""
        try:
            initialise_by_name([Forgetful()], std=0.05, seed=1)
        except RuntimeError as error:
            failure = str(error)
        return {
            "num_same": sum(torch.equal(first[name], again[name]) for name in first),
            "num_other": sum(not torch.equal(first[name], other[name]) for name in first),
            "num_all": len(first),
            "num_norms": len(norms),
            "mean_of_norms": torch.cat(norms).mean().item(),
            "std_of_matrices": torch.cat([matrix.flatten() for matrix in matrices]).std().item(),
            "failure": failure,
        }


def test_weights_depend_on_name_and_seed_alone(zygote: Zygote) -> None:
    (drawn,) = zygote.fork(1, drawn_twice)
    assert drawn["num_same"] == drawn["num_other"] == drawn["num_all"]
    # 5 layers with 2 norms, 2 latent norms each; 2 norms and a final one in MTP, a final one
    assert drawn["num_norms"] == 5 * 4 + 3 + 1
    assert abs(drawn["mean_of_norms"] - 1.0) < 0.01
    assert abs(drawn["std_of_matrices"] - 0.05) < 0.001
    assert drawn["failure"].startswith("kept_back: 0 of 3 values stand in the sharded state dict")


def experts_drawn_apart(parallel: dict[str, Any], seat: Seat) -> dict[str, list[float]]:
    """Each expert's weights of the first expert layer, as far as this rank holds them, by name and number."""
    recipe = laid_out(parity_recipe("qwen3_30b_a3b"), parallel=parallel)
    arguments = megatron_arguments(recipe)
    with joined(arguments, settings_of(arguments), seat.rendezvous, listen_fd=seat.listen_fd):
        config = transformer_config(arguments)
        set_seeds(seat.rendezvous.rank)
        chunks = model_chunks(arguments, settings_of(arguments), config, device="cpu")
        initialise_by_name(chunks, std=0.05, seed=3, experts_apart=True)
        nudge_by_name(chunks, fraction=2.0**-8, seed=5, experts_apart=True)
        found: dict[str, list[float]] = {}
        for shard in sharded_tensors(chunks[0]):
            if ".experts.experts." not in shard.key or shard.data is None:
                continue
            axis = len(shard.global_shape) - 3
            first, shape = shard.global_offset[axis], (-1, *shard.local_shape[-2:])
            for number, weights in enumerate(shard.data.detach().reshape(shape), start=first):
                place = (*shard.global_offset[:axis], number, *shard.global_offset[axis + 1 :])
                found[f"{shard.key}:{place}"] = weights.flatten().tolist()
        return found


def test_experts_that_are_drawn_apart_are_the_same_on_any_rank(zygote: Zygote) -> None:
    (whole,) = zygote.fork(1, partial(experts_drawn_apart, {}))
    parts = zygote.fork(2, partial(experts_drawn_apart, {"num_gpus": 2, "expert": 2}))
    # 4 layers, 8 experts, two matrices
    assert len(whole) == 4 * 8 * 2
    assert [len(part) for part in parts] == [len(whole) // 2] * 2
    assert parts[0] | parts[1] == whole
    assert len({tuple(weights) for weights in whole.values()}) == len(whole)
