"""Initial weights: functions of a parameter's name, and an error where one has none."""

from __future__ import annotations

from typing import Any

import torch

from moe_bench.harness.build import model_chunks, set_seeds, transformer_config
from moe_bench.harness.host_device import host_device
from moe_bench.harness.mcore_config import megatron_arguments
from moe_bench.harness.patches import patches
from moe_bench.harness.process_groups import process_groups
from moe_bench.harness.rank import wanted_patches
from moe_bench.harness.settings import settings_of
from moe_bench.harness.weights import initialise_by_name
from moe_bench.harness.workers import Seat
from tests.harness.toys import parity_recipe
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
