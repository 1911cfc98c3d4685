"""What autograd keeps of whole models without data; on a GPU, the same models for real keep as much."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from moe_bench.harness.build import Training
from moe_bench.harness.dryrun.accounting import Account
from moe_bench.harness.dryrun.findings import Findings
from moe_bench.harness.dryrun.one_rank import Watch, built_without_data, micro_batches_without_data, stage
from moe_bench.harness.dryrun.places import Places
from moe_bench.harness.loopback import Ledger, loopback_groups
from moe_bench.harness.mcore_config import megatron_arguments
from moe_bench.harness.patches import patch_names, patches
from moe_bench.harness.rank import build
from moe_bench.harness.settings import settings_of
from moe_bench.spec.recipe import Fusions, Recipe, Recompute
from tests.harness.dryrun.conftest import SEQ_LEN, toy
from tests.harness.dryrun.test_stand_ins import kept_bytes

EP4 = {"num_gpus": 4, "expert": 4}
SELECTIVE = Recompute(granularity="selective", modules=("moe_act", "layernorm"))
RANDOM_STATE_BYTES = 64
"""The flash kernel keeps a seed and an offset, which the stand-in does not."""

STRUCTURES: Mapping[str, Any] = {
    "grouped queries and experts": ("qwen3_30b_a3b", Recompute()),
    "grouped queries, activations recomputed": ("qwen3_30b_a3b", SELECTIVE),
    "latent attention, shared experts": ("deepseek_v3", Recompute()),
    "few large experts": ("mixtral_8x7b", Recompute()),
}


def model_of(structure: str, *, fused: bool = False, num_layers: int = 4) -> Recipe:
    """What a dry run builds of a structure, with the kernels of torch alone unless `fused`."""
    name, recompute = STRUCTURES[structure]
    asked = toy(name, parallel=EP4, num_layers=num_layers, recompute=recompute)
    if fused:
        return asked
    return asked.model_copy(update={"kernels": asked.kernels.model_copy(update={"fusions": Fusions()})})


def kept_forward(built: Training, batch: Mapping[str, torch.Tensor]) -> int:
    """Bytes of all that one forward pass leaves for the backward pass, besides weights."""
    (chunk,) = built.chunks
    return kept_bytes(
        lambda: chunk(
            batch["tokens"],
            batch["position_ids"],
            None,
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
        ),
        besides=chunk.parameters(),
    )


def kept_without_data(recipe: Recipe) -> int:
    """On tensors without data, with stand-ins for fused kernels."""
    places = Places()
    watch = Watch(
        places=places,
        account=Account(places),
        ledger=Ledger(places.where),
        findings=Findings(places, frees_weights=False),
    )
    with stage(recipe, 0, watch, None):
        built = built_without_data(recipe, watch)
        return kept_forward(built, micro_batches_without_data(recipe)[0])


def kept_on_the_gpu(recipe: Recipe) -> int:
    """The same rank alone on a GPU, with real kernels."""
    arguments = megatron_arguments(recipe)
    values = torch.arange(SEQ_LEN, device="cuda")[None]
    batch = {
        "tokens": values,
        "position_ids": values,
        "labels": values,
        "loss_mask": torch.ones_like(values, dtype=torch.float32),
    }
    with (
        patches((*patch_names("no_transformer_engine"), *recipe.patches)),
        loopback_groups(
            world_size=recipe.parallel.num_gpus,
            rank=0,
            sizes=arguments.parallel_state,
            on_transfer=lambda transfer: None,
        ),
    ):
        built = build(arguments, settings_of(arguments), device="cuda")
        return kept_forward(built, batch)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_each_further_layer_keeps_as_much(structure: str) -> None:
    two, three, four = (kept_without_data(model_of(structure, num_layers=number)) for number in (2, 3, 4))
    assert 0 < two < three
    assert four - three == three - two


@pytest.mark.gpu("what CUDA kernels keep for the backward pass differs from what the CPU's keep")
@pytest.mark.parametrize("structure", STRUCTURES)
def test_real_layers_keep_what_those_without_data_keep(structure: str) -> None:
    recipe = model_of(structure)
    real, expected = kept_on_the_gpu(recipe), kept_without_data(recipe)
    assert expected <= real <= expected + RANDOM_STATE_BYTES * recipe.model.num_layers


@pytest.mark.gpu("Transformer Engine has no CPU path")
@pytest.mark.parametrize("structure", STRUCTURES)
def test_layers_with_transformer_engines_fusions_keep_what_those_without_data_keep(structure: str) -> None:
    pytest.importorskip("transformer_engine.pytorch")
    recipe = model_of(structure, fused=True)
    real, expected = kept_on_the_gpu(recipe), kept_without_data(recipe)
    assert expected <= real <= expected + RANDOM_STATE_BYTES * recipe.model.num_layers
