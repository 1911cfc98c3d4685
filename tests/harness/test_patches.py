"""Patches: tied to the source that they replace, undone afterwards, and never mixed up between machines."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import get_args

import pytest

from moe_bench.errors import BadInputError, MissingRequirementError
from moe_bench.harness import patches as patches_module
from moe_bench.harness.patches import PATCHES, AppliedPatch, Patch, patch_names, patches
from moe_bench.harness.rank import wanted_patches
from moe_bench.harness.settings import Settings
from moe_bench.spec.catalogue import data_root
from moe_bench.spec.recipe import KernelFamily, PatchName


def original_of(patch: Patch) -> object:
    found: object = importlib.import_module(patch.module)
    for name in patch.attribute.split("."):
        found = getattr(found, name)
    return found


def test_a_recipe_can_name_every_patch_that_changes_numbers_and_no_other() -> None:
    assert get_args(PatchName) == patch_names("numbers")


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_a_patch_is_held_for_the_block_only(patch: Patch) -> None:
    before = original_of(patch)
    with patches([patch.name]) as applied:
        assert original_of(patch) is not before
        assert applied == (
            AppliedPatch(name=patch.name, serves=patch.serves, what=patch.what, upstream=patch.upstream),
        )
    assert original_of(patch) is before


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_a_patch_written_for_another_source_stops_the_run(
    patch: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = dataclasses.replace(patch, source_sha256="0" * 64)
    monkeypatch.setattr(patches_module, "PATCHES", (stale,))
    with (
        pytest.raises(MissingRequirementError, match=f"patch {patch.name}: .* expected 000000000000"),
        patches([patch.name]),
    ):
        pass


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_the_upstream_place_lies_in_what_the_patch_replaces(patch: Patch) -> None:
    original = original_of(patch)
    assert callable(original)
    lines, first = inspect.getsourcelines(original)
    path, _, line = patch.upstream.partition(":")
    assert str(inspect.getsourcefile(original)).endswith(f"/{path}")
    assert first <= int(line) < first + len(lines)


def test_an_unknown_patch_is_refused_with_the_known_ones() -> None:
    with (
        pytest.raises(BadInputError, match="patches: mtp_fix: no such patch; there are host_rng_read"),
        patches(["mtp_fix"]),
    ):
        pass


def settings(
    *, device: str | None, wanted: tuple[str, ...], family: KernelFamily = "torch_native"
) -> Settings:
    return Settings(
        kernel_family=family,
        experts_are_fp8=False,
        triton_fusions=(),
        quantization_format=None,
        quantizes_experts_only=False,
        num_calibration_batches=0,
        router_choice="top_k",
        router_has_bias=True,
        shared_expert_mixing="sum",
        expert_steps=(),
        eval_capacity_factor=None,
        min_capacity=0,
        qk_norm="none",
        seq_length=32,
        micro_batch_size=1,
        global_batch_size=1,
        world_size=1,
        routing_mode="natural",
        routing_trace=(),
        num_warmup_steps=1,
        num_timed_steps=1,
        seed=0,
        patches=wanted,
        device=device,
    )


GPU = "NVIDIA H100 80GB HBM3"


def test_on_a_gpu_kernels_without_transformer_engine_get_the_patches_that_mend_its_absence() -> None:
    mends = patch_names("no_transformer_engine")
    asked = ("mtp_token_count_under_cp",)
    assert wanted_patches(settings(device=GPU, wanted=())) == mends
    assert wanted_patches(settings(device=GPU, wanted=asked)) == (*mends, *asked)
    assert wanted_patches(settings(device=GPU, wanted=asked, family="transformer_engine")) == asked


def test_a_patch_for_hosts_is_refused_on_a_gpu() -> None:
    with pytest.raises(BadInputError, match="host_rng_read: for machines without a GPU only"):
        wanted_patches(settings(device=GPU, wanted=("host_rng_read",)))


def test_without_a_gpu_no_patch_that_changes_numbers_comes_by_itself() -> None:
    wanted = wanted_patches(settings(device=None, wanted=()))
    assert set(wanted) == {*patch_names("host"), *patch_names("no_transformer_engine")}


def test_every_patch_is_documented_where_recipes_point_to() -> None:
    text = (data_root() / "docs" / "patches.md").read_text()
    rows = {line.split("|")[1].strip(" `") for line in text.splitlines() if line.startswith("| `")}
    assert rows == {patch.name for patch in PATCHES}
