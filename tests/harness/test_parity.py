"""Every layout trains the same model: losses and gradient norms against one process, for four structures."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from moe_bench.errors import BadInputError
from moe_bench.harness.mcore_config import megatron_arguments
from moe_bench.results.record import Samples
from moe_bench.spec.recipe import Overlap, Recipe, Recompute
from tests.harness.toys import laid_out, parity_recipe
from tests.harness.zygote import Zygote

STRUCTURES = ("deepseek_v3", "qwen3_30b_a3b", "gpt_oss_20b", "mixtral_8x7b")
LOSS_TOLERANCE = 1e-5
GRAD_NORM_TOLERANCE = 1e-4

TP2 = {"tensor": 2, "sequence_parallel": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"num_gpus": 2, **TP2},
    "PP2": {"num_gpus": 2, "pipeline": 2},
    "PP2xVPP2": {"num_gpus": 2, "pipeline": 2, "virtual_pipeline": 2},
    "PP2 by a layout string": {"num_gpus": 2, "pipeline": 2, "layout": "Et|tttL"},
    "EP2": {"num_gpus": 2, "expert": 2},
    "EP2xETP2": {"num_gpus": 4, "expert": 2, "expert_tensor": 2, **TP2},
    "CP2": {"num_gpus": 2, "context": 2, "context_comm": "allgather"},
    "FSDP, EP1 over 2": {"num_gpus": 2, "data_sharding": "megatron_fsdp"},
    "FSDP, EP2 over 4": {"num_gpus": 4, "expert": 2, "data_sharding": "megatron_fsdp"},
    "TP2xPP2xEP2 on 4": {"num_gpus": 4, "pipeline": 2, "expert": 2, **TP2},
    "TP2xPP2xEP2 on 8": {"num_gpus": 8, "pipeline": 2, "expert": 2, **TP2},
}
FSDP_OVERLAP = Overlap(grad_reduce=True, param_gather=True)
"""Megatron-FSDP overlaps what it shards, asked or not."""
MTP_PATCH = "mtp_token_count_under_cp"


class Trainer:
    """Trains recipes, and each structure on one process once only."""

    def __init__(self, zygote: Zygote) -> None:
        self._zygote = zygote
        self.on_one_process = functools.cache(self._on_one_process)

    def train(self, recipe: Recipe) -> Samples:
        return self._zygote.train(megatron_arguments(recipe)).samples

    def _on_one_process(self, structure: str, *, is_dense: bool = False) -> Samples:
        return self.train(structure_of(structure, is_dense=is_dense))


@pytest.fixture(scope="session")
def trainer(zygote: Zygote) -> Trainer:
    return Trainer(zygote)


def structure_of(name: str, *, is_dense: bool = False) -> Recipe:
    recipe = parity_recipe(name)
    if not is_dense:
        return recipe
    model = recipe.model.model_copy(update={"moe": None, "dense_ffn_hidden_size": 128})
    return recipe.model_copy(update={"model": model})


def layout_of(name: str, recipe: Recipe) -> dict[str, Any]:
    layout = LAYOUTS[name]
    if "layout" in layout:
        layout = layout | {"layout": layout["layout"].replace("L", "m" * recipe.num_mtp_layers + "L")}
    return layout


def changes_of(name: str, recipe: Recipe) -> dict[str, Any]:
    if "VPP" in name:
        # Batched transfers between two stages corrupt the gradients of the interleaved schedule.
        return {"overlap": Overlap(p2p=True)}
    if "FSDP" in name:
        return {"overlap": FSDP_OVERLAP}
    return {"patches": (MTP_PATCH,)} if "CP" in name and recipe.num_mtp_layers else {}


def assert_same_training(found: Samples, expected: Samples) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=GRAD_NORM_TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_layout_trains_like_one_process(trainer: Trainer, structure: str, layout: str) -> None:
    recipe = structure_of(structure)
    if recipe.model.linear_bias and "ETP" in layout:
        parallel = recipe.parallel.model_copy(update=LAYOUTS[layout])
        with pytest.raises(BadInputError, match="Bias in Moe is only supported when ETP==1"):
            trainer.train(recipe.model_copy(update={"parallel": parallel}))
        return
    laid = laid_out(recipe, parallel=layout_of(layout, recipe), **changes_of(layout, recipe))
    assert_same_training(trainer.train(laid), trainer.on_one_process(structure))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_sharding_a_dense_model_trains_like_one_process(trainer: Trainer, structure: str) -> None:
    recipe = structure_of(structure, is_dense=True)
    parallel = {"num_gpus": 2, "data_sharding": "megatron_fsdp"}
    laid = laid_out(recipe, parallel=parallel, overlap=FSDP_OVERLAP)
    assert_same_training(trainer.train(laid), trainer.on_one_process(structure, is_dense=True))


def test_without_its_patch_the_mtp_loss_differs_under_context_parallelism(trainer: Trainer) -> None:
    laid = laid_out(structure_of("deepseek_v3"), parallel=LAYOUTS["CP2"])
    found, expected = trainer.train(laid), trainer.on_one_process("deepseek_v3")
    assert found.losses[0] == pytest.approx(expected.losses[0], rel=LOSS_TOLERANCE)
    assert found.grad_norms[0] != pytest.approx(expected.grad_norms[0], rel=GRAD_NORM_TOLERANCE)
    assert found.losses[1:] != pytest.approx(expected.losses[1:], rel=LOSS_TOLERANCE)


@pytest.mark.parametrize(
    "recompute",
    [
        Recompute(granularity="full", method="uniform", num_layers=1),
        Recompute(granularity="selective", modules=("layernorm", "moe_act", "mla_up_proj")),
        Recompute(granularity="selective", modules=("core_attn", "mlp", "moe")),
    ],
    ids=lambda recompute: "+".join(recompute.modules) or "full",
)
def test_recomputing_activations_changes_nothing(trainer: Trainer, recompute: Recompute) -> None:
    recipe = structure_of("deepseek_v3").model_copy(update={"recompute": recompute})
    found, expected = trainer.train(recipe), trainer.on_one_process("deepseek_v3")
    assert_same_training(found, expected)
    assert found.tokens_per_expert == expected.tokens_per_expert


@pytest.mark.parametrize("structure", ["deepseek_v3", "gpt_oss_20b"])
def test_overlapped_data_parallelism_trains_like_one_process(trainer: Trainer, structure: str) -> None:
    overlap = Overlap(grad_reduce=True, param_gather=True)
    laid = laid_out(structure_of(structure), parallel=LAYOUTS["EP2"], overlap=overlap)
    assert_same_training(trainer.train(laid), trainer.on_one_process(structure))


@pytest.mark.slow
def test_gathering_under_the_optimizers_step_trains_right_with_its_patch_alone(trainer: Trainer) -> None:
    recipe = structure_of("qwen3_30b_a3b")
    parallel = LAYOUTS["PP2xVPP2"] | {"num_gpus": 8, "expert": 2}
    overlap = Overlap(p2p=True, grad_reduce=True, param_gather=True, param_gather_with_optimizer_step=True)
    laid = laid_out(recipe, parallel=parallel, overlap=overlap)
    expected = trainer.on_one_process("qwen3_30b_a3b")
    patched = trainer.train(laid.model_copy(update={"patches": ("expert_gather_with_step",)}))
    assert_same_training(patched, expected)
    plain = trainer.train(laid)
    assert plain.losses[0] == pytest.approx(expected.losses[0], rel=LOSS_TOLERANCE)
    assert plain.losses[1:] != pytest.approx(expected.losses[1:], rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("layout", ["EP2", "PP2xVPP2xEP2"])
def test_hiding_dispatch_under_computation_changes_no_bit(trainer: Trainer, layout: str) -> None:
    recipe = structure_of("qwen3_30b_a3b").model_copy(update={"precision": "bf16"})
    has_pipeline = layout != "EP2"
    parallel = LAYOUTS["PP2xVPP2"] | {"num_gpus": 4, "expert": 2} if has_pipeline else LAYOUTS["EP2"]
    plain, hidden = (
        trainer.train(
            laid_out(recipe, parallel=parallel, overlap=Overlap(expert_parallel=is_hidden, p2p=has_pipeline))
        )
        for is_hidden in (False, True)
    )
    assert hidden.losses == plain.losses
    assert hidden.grad_norms == plain.grad_norms
    assert hidden.tokens_per_expert == plain.tokens_per_expert


def test_the_allgather_dispatcher_trains_like_one_process(trainer: Trainer) -> None:
    recipe = structure_of("qwen3_30b_a3b")
    dispatch = recipe.dispatch.model_copy(update={"dispatcher": "allgather"})
    laid = laid_out(recipe, parallel=LAYOUTS["EP2"], dispatch=dispatch)
    found = trainer.train(laid)
    assert found.implementations.dispatcher == "MoEAllGatherTokenDispatcher"
    assert_same_training(found, trainer.on_one_process("qwen3_30b_a3b"))
