"""Is everything here that a recipe asks for? Nothing is replaced silently: what is missing stops the run."""

from __future__ import annotations

import importlib.util
import shutil
from importlib import metadata
from typing import cast

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.mcore_config import MegatronArguments
from moe_bench.harness.mcore_fields import SUPPORTED_MEGATRON_CORE

_FLEX_PACKAGES = {"deepep": "deep_ep", "hybridep": "deep_ep", "ncclep": "transformer_engine"}
"""Package that each backend of the flex dispatcher imports (transformer/moe/fused_a2a.py:11, :271, :610)."""
_SHARE_STORAGE = ("layernorm", "mla_up_proj")
"""Recomputed modules whose released output takes over the memory of the recomputed one, which needs a C++
extension (tensor_parallel/random.py:69); `moe_act` too, with Transformer Engine's experts alone."""


def require_runnable(arguments: MegatronArguments) -> None:
    """Raise MissingRequirementError, naming the recipe field, if this installation cannot run `arguments`."""
    _require_versions()
    _require_kernels(arguments)
    require_supported(arguments)
    _require_dispatcher(arguments)
    _require_compiler(arguments)


def require_supported(arguments: MegatronArguments) -> None:
    """Raise MissingRequirementError where `arguments` run nowhere, whatever is installed.

    A run in a container is asked this before it queues; what its image holds is not known here.
    """
    transformer, training = arguments.transformer, arguments.training
    if (transformer["fp8"] or transformer["fp4"]) and training["kernel_family"] != "transformer_engine":
        raise MissingRequirementError(
            f"precision: {transformer['fp8'] or transformer['fp4']} needs kernels.family: "
            f"transformer_engine, not {training['kernel_family']}"
        )
    if training["experts_are_fp8"] and training["device"] is None:
        raise MissingRequirementError(
            "precision: fp8_rowwise runs on Hopper alone; torch's scaled_grouped_mm has no code for a CPU"
        )
    main_params_dtype = arguments.optimizer["main_params_dtype"]
    if main_params_dtype != "fp32" and training["kernel_family"] != "transformer_engine":
        raise MissingRequirementError(
            f"optimizer.main_params_dtype: {main_params_dtype} needs Transformer Engine's FusedAdam "
            "(megatron/core/optimizer/optimizer_config.py:450)"
        )
    if (problem := _graph_problem(arguments)) is not None:
        raise MissingRequirementError(f"cuda_graphs.{problem}; run it without graphs, --set cuda_graphs={{}}")
    if transformer["tp_comm_overlap"]:
        raise MissingRequirementError(
            "overlap.tensor_parallel: no code sets up Transformer Engine's user buffers yet; "
            "--set overlap.tensor_parallel=false runs without"
        )


def require_no_graphs(arguments: MegatronArguments) -> None:
    """Raise MissingRequirementError where a verb that does more than timed steps is asked for CUDA graphs."""
    if (implementation := arguments.transformer["cuda_graph_impl"]) != "none":
        raise MissingRequirementError(
            f"cuda_graphs.implementation: {implementation}: `run` alone captures graphs; random numbers that "
            "are seeded anew in each step, and losses of data that is not learnt, would pass them by; "
            "--set cuda_graphs={}"
        )


def _graph_problem(arguments: MegatronArguments) -> str | None:
    """The key under `cuda_graphs` that no code here captures a step with, and why; None where one does."""
    transformer, kind = arguments.transformer, arguments.transformer["cuda_graph_impl"]
    if kind == "none":
        return None
    if arguments.ddp["use_megatron_fsdp"]:
        return f"implementation: {kind} with Megatron-FSDP: no code sets its graph mode"
    if arguments.training["router_choice"] == "gshard":
        return (
            f"implementation: {kind} with model.moe.router.choice: gshard: what its routers draw is among "
            "the random states, all of which a graph takes for generators"
        )
    if kind == "local" and transformer["cuda_graph_modules"]:
        return (
            f"modules: some with {kind}: Megatron-Core captures layers of GPTModel whole "
            "(MoETransformerLayer, which has parts, is of hybrid models)"
        )
    if kind == "full_iteration" and transformer.get("moe_expert_rank_capacity_factor") is not None:
        return (
            f"implementation: {kind} with mcore.moe_expert_rank_capacity_factor: no code drives "
            "Megatron-Core's PagedStashRunner, which repeats a step whose tokens overflow that budget"
        )
    num_warmup = cast(int, arguments.training["num_warmup_steps"])
    num_eager = cast(int, transformer["cuda_graph_warmup_steps"])
    num_untimed = 2 if kind == "local" else num_eager + 1
    if num_warmup < num_untimed:
        return (
            f"num_warmup_steps: {num_eager} with steps.num_warmup: {num_warmup}: the capture would be timed; "
            f"write steps.num_warmup: {num_untimed} or more"
        )
    return None


def _require_kernels(arguments: MegatronArguments) -> None:
    family = arguments.training["kernel_family"]
    if family == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        raise MissingRequirementError(
            "kernels.family: transformer_engine is not installed; use the container, "
            "`pip install moe_bench[transformer-engine]`, or --set kernels.family=torch_native"
        )
    if family == "quack" and importlib.util.find_spec("quack") is None:
        raise MissingRequirementError(
            "kernels.family: quack needs the package quack-kernels, not installed; "
            "`pip install moe_bench[quack]`"
        )


def _require_versions() -> None:
    version = metadata.version("megatron-core")
    if version.split(".")[:2] != SUPPORTED_MEGATRON_CORE.split("."):
        raise MissingRequirementError(
            f"megatron-core {version} is installed; "
            f"this version of moe_bench speaks {SUPPORTED_MEGATRON_CORE}.x"
        )


def _require_dispatcher(arguments: MegatronArguments) -> None:
    if arguments.transformer.get("moe_token_dispatcher_type") != "flex":
        return
    backend = str(arguments.transformer["moe_flex_dispatcher_backend"])
    package = _FLEX_PACKAGES[backend]
    if importlib.util.find_spec(package) is None:
        raise MissingRequirementError(
            f"dispatch.dispatcher: {backend} needs the package {package}, not installed; use the container, "
            "or --set dispatch.dispatcher=alltoall"
        )


def _require_compiler(arguments: MegatronArguments) -> None:
    """What Megatron-Core compiles in the first backward pass on a GPU would end the run there."""
    recomputed = arguments.transformer["recompute_modules"]
    is_engine = arguments.training["kernel_family"] == "transformer_engine"
    sharing = (*_SHARE_STORAGE, "moe_act") if is_engine else _SHARE_STORAGE
    shared = [name for name in sharing if isinstance(recomputed, tuple) and name in recomputed]
    if shared and arguments.training["device"] is not None and shutil.which("ninja") is None:
        raise MissingRequirementError(
            f"recompute.modules: {', '.join(shared)}: Megatron-Core compiles C++ for it and finds no `ninja` "
            "on PATH; `pip install ninja`, and add the folder of this Python's scripts to PATH"
        )
