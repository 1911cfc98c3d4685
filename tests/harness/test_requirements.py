"""What is not here stops a run, with the recipe field in the message; nothing is replaced."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from importlib import metadata
from typing import Any

import pytest

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.mcore_config import MegatronArguments, megatron_arguments
from moe_bench.harness.requirements import require_no_graphs, require_runnable
from tests.harness.toys import smoke_recipe


def arguments(**sections: dict[str, Any]) -> MegatronArguments:
    base = megatron_arguments(smoke_recipe("qwen3_30b_a3b"))
    return dataclasses.replace(
        base, **{name: getattr(base, name) | section for name, section in sections.items()}
    )


def graphs(
    kind: str, *, modules: tuple[str, ...] = (), num_warmup: int = 10, budget: float | None = None
) -> dict[str, dict[str, Any]]:
    return {
        "transformer": {
            "cuda_graph_impl": kind,
            "cuda_graph_modules": modules,
            "moe_expert_rank_capacity_factor": budget,
        },
        "training": {"num_warmup_steps": num_warmup},
    }


def installed(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Make it look as if of the optional packages only these were there."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in packages else None)


def test_a_smoke_recipe_needs_nothing_more() -> None:
    require_runnable(arguments())


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"training": {"kernel_family": "transformer_engine"}}, "kernels.family: transformer_engine is not"),
        ({"training": {"kernel_family": "quack"}}, "kernels.family: quack needs the package quack-kernels"),
        ({"transformer": {"fp8": "e4m3"}}, "precision: e4m3 needs kernels.family: transformer_engine"),
        ({"training": {"experts_are_fp8": True}}, "precision: fp8_rowwise runs on Hopper alone"),
        ({"transformer": {"fp4": "e2m1"}}, "precision: e2m1 needs kernels.family: transformer_engine"),
        (graphs("local", modules=("moe_router",)), "cuda_graphs.modules: some with local: .* whole"),
        (
            graphs("local") | {"training": {"router_choice": "gshard"}},
            "local with model.moe.router.choice: gs",
        ),
        (graphs("local", num_warmup=1), "cuda_graphs.num_warmup_steps: 3 .* steps.num_warmup: 2 or more"),
        (graphs("full_iteration", num_warmup=3), "steps.num_warmup: 3: .* steps.num_warmup: 4 or more"),
        (graphs("full_iteration", budget=1.5), "no code drives Megatron-Core's PagedStashRunner"),
        (
            graphs("full_iteration") | {"ddp": {"use_megatron_fsdp": True}},
            "full_iteration with Megatron-FSDP",
        ),
        ({"transformer": {"tp_comm_overlap": True}}, "overlap.tensor_parallel: no code sets up"),
        ({"optimizer": {"main_params_dtype": "fp16"}}, "optimizer.main_params_dtype: fp16 needs"),
        (
            {"transformer": {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "hybridep"}},
            "dispatch.dispatcher: hybridep needs the package deep_ep, not installed",
        ),
    ],
)
def test_what_is_missing_is_named_by_its_recipe_field(
    monkeypatch: pytest.MonkeyPatch, sections: dict[str, dict[str, Any]], words: str
) -> None:
    installed(monkeypatch)
    with pytest.raises(MissingRequirementError, match=words):
        require_runnable(arguments(**sections))


@pytest.mark.parametrize(
    ("family", "modules", "named"),
    [
        ("torch_native", ("layernorm", "moe_act"), "layernorm: Megatron"),
        ("transformer_engine", ("moe_act", "mlp"), "moe_act: Megatron"),
        ("torch_native", ("moe_act", "core_attn"), None),
    ],
)
def test_what_megatron_core_compiles_on_a_gpu_needs_ninja(
    monkeypatch: pytest.MonkeyPatch, family: str, modules: tuple[str, ...], named: str | None
) -> None:
    installed(monkeypatch, "transformer_engine")
    monkeypatch.setattr(shutil, "which", lambda program: None)
    recomputed = {"transformer": {"recompute_modules": modules}, "training": {"kernel_family": family}}
    require_runnable(arguments(**recomputed))  # a host hands storage over in Python
    recomputed["training"]["device"] = "NVIDIA H100 80GB HBM3"
    if named is None:
        require_runnable(arguments(**recomputed))
        return
    with pytest.raises(MissingRequirementError, match=rf"recompute\.modules: {named}-Core compiles C\+\+"):
        require_runnable(arguments(**recomputed))


def test_what_is_installed_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "transformer_engine", "deep_ep")
    require_runnable(
        arguments(
            training={"kernel_family": "transformer_engine"},
            transformer={
                "fp8": "e4m3",
                "moe_token_dispatcher_type": "flex",
                "moe_flex_dispatcher_backend": "deepep",
            },
            optimizer={"main_params_dtype": "fp16"},
        )
    )


@pytest.mark.parametrize(
    ("kind", "num_warmup"), [("local", 2), ("transformer_engine", 4), ("full_iteration", 4)]
)
def test_graphs_that_are_captured_before_the_first_timed_step_run(kind: str, num_warmup: int) -> None:
    require_runnable(arguments(**graphs(kind, num_warmup=num_warmup)))


@pytest.mark.parametrize("kind", ["local", "transformer_engine", "full_iteration"])
def test_no_other_verb_than_run_captures_graphs(kind: str) -> None:
    require_no_graphs(arguments())
    with pytest.raises(MissingRequirementError, match=f"cuda_graphs.implementation: {kind}: `run` alone"):
        require_no_graphs(arguments(**graphs(kind)))


def test_another_series_of_megatron_core_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "0.20.0")
    with pytest.raises(MissingRequirementError, match=r"megatron-core 0\.20\.0 is installed; .* 0\.19\.x"):
        require_runnable(arguments())
