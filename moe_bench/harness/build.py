"""The model chunks of one rank, wrapped for data parallelism, and their optimizer, from plain arguments."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from megatron.core.full_cuda_graph import get_shared_capture_stream
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from moe_bench.errors import BadInputError
from moe_bench.harness.batches import Device
from moe_bench.harness.kernels.activation import gelu
from moe_bench.harness.kernels.adam import low_precision_adam
from moe_bench.harness.kernels.layer_spec import decoder_block_spec, mtp_block_spec
from moe_bench.harness.kernels.provider import KernelChoice
from moe_bench.harness.mcore_config import MegatronArguments
from moe_bench.harness.routers import chosen_router, tell_dispatchers
from moe_bench.harness.routing import RouterBuilder, use_router
from moe_bench.harness.settings import Settings
from moe_bench.harness.training.learning_rate import expert_overrides
from moe_bench.spec.training import LearningRate

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}
_DTYPE_FIELDS = frozenset(
    {
        "params_dtype",
        "pipeline_dtype",
        "main_grads_dtype",
        "megatron_fsdp_main_grads_dtype",
        "main_params_dtype",
        "exp_avg_dtype",
        "exp_avg_sq_dtype",
    }
)
"""Fields that Megatron-Core wants as torch types; `moe_router_dtype` and its like stay text."""
_SEEDS_OF_A_STEP = 1_000_003
"""More than lie between those of two ranks."""
_SAME_TRACKER: Mapping[str, bool] = {}
_ACTIVATIONS: Mapping[str, Callable[..., Any]] = {
    "silu": torch.nn.functional.silu,
    "quick_gelu": quick_gelu,
    "gelu_tanh": gelu,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """Everything that a step needs, on one rank."""

    config: TransformerConfig
    chunks: tuple[torch.nn.Module, ...]
    """One per virtual pipeline stage, wrapped."""
    optimizer: Any
    """None of a model that learns nothing."""


def transformer_config(arguments: MegatronArguments) -> TransformerConfig:
    """Megatron-Core's config, with names turned into types and functions.

    Raises BadInputError with Megatron-Core's own words where it refuses the arguments.
    """
    config_class = (
        MLATransformerConfig if arguments.config_class == "MLATransformerConfig" else TransformerConfig
    )
    try:
        config = config_class(**_objects(arguments.transformer))
    except (AssertionError, ValueError) as error:
        raise BadInputError(f"Megatron-Core refuses the recipe: {error}") from error
    for name, value in arguments.config_attributes.items():
        setattr(config, name, value)
    return config


def random_tracker(arguments: MegatronArguments) -> Mapping[str, bool]:
    """Which tracker of random states `set_seeds` makes: for CUDA graphs one whose states a graph can advance.

    Transformer Engine's where its modules draw, as Megatron-LM's validate_args has it.
    """
    if arguments.transformer["cuda_graph_impl"] == "none":
        return {}
    is_engine = arguments.training["kernel_family"] == "transformer_engine"
    return {"te_rng_tracker": is_engine, "use_cudagraphable_rng": not is_engine, "force_reset_rng": True}


def set_seeds(seed: int, *, step: int = 0, tracker: Mapping[str, bool] = _SAME_TRACKER) -> None:
    """Seed every generator as Megatron-LM's training script does (_set_random_seed), anew for each `step`.

    `tracker` is what `random_tracker` says.
    """
    seed += _SEEDS_OF_A_STEP * step + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, **tracker)


def model_chunks(
    arguments: MegatronArguments, settings: Settings, config: TransformerConfig, *, device: Device
) -> tuple[torch.nn.Module, ...]:
    """The unwrapped model chunks of this rank, one per virtual pipeline stage."""
    choice = KernelChoice(
        family=settings.kernel_family,
        device_type=device,
        qk_norm="none" if settings.qk_norm == "latent" else settings.qk_norm,
        experts_are_apart=bool(arguments.ddp["use_megatron_fsdp"]),
        experts_are_fp8=settings.experts_are_fp8,
        fusions=frozenset(settings.triton_fusions),
        expert_steps=settings.expert_steps,
        mixes_shared_experts=settings.shared_expert_mixing == "softmax",
    )
    num_stages = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    stages: tuple[int | None, ...] = (None,) if num_stages is None else tuple(range(num_stages))
    chunk = partial(_model_chunk, arguments, config, choice, chosen_router(settings, config))
    return tuple(chunk(stage) for stage in stages)


def _model_chunk(
    arguments: MegatronArguments,
    config: TransformerConfig,
    choice: KernelChoice,
    router: RouterBuilder | None,
    vp_stage: int | None,
) -> torch.nn.Module:
    """One stage of the model. The only function that names the model class.

    GPTModel, as every published row used it. megatron-core 0.19 marks it deprecated in favour of HybridModel
    (Megatron-LM #6071).
    """
    from megatron.core.models.gpt.gpt_model import GPTModel

    block = decoder_block_spec(config, choice, vp_stage=vp_stage)
    mtp = mtp_block_spec(config, choice, vp_stage=vp_stage) if config.mtp_num_layers else None
    if router is not None:
        use_router((block, mtp), router)
    ends = {"ignore_virtual": False, "vp_stage": vp_stage}
    chunk = GPTModel(
        config=config,
        transformer_layer_spec=block,
        mtp_block_spec=mtp,
        pre_process=parallel_state.is_pipeline_first_stage(**ends),
        post_process=parallel_state.is_pipeline_last_stage(**ends),
        vp_stage=vp_stage,
        **arguments.model,
    )
    tell_dispatchers(chunk.modules())
    return chunk


def training(
    arguments: MegatronArguments,
    settings: Settings,
    config: TransformerConfig,
    chunks: tuple[torch.nn.Module, ...],
    *,
    device: Device,
    rates: LearningRate | None = None,
) -> Training:
    """Wrap the chunks for data parallelism, make the optimizer, and connect both to the schedule.

    `rates` is what a schedule of the learning rate wants of the optimizer; None keeps it constant.
    """
    chunks = _in_precision(config, chunks, device=device)
    ddp_config = DistributedDataParallelConfig(**_objects(arguments.ddp))
    gathers_in_step = bool(arguments.optimizer["overlap_param_gather_with_optimizer_step"])
    with _wrapping_stream(config):
        wrapped = _wrap(chunks, config, ddp_config, device=device, gathers_in_step=gathers_in_step)
    optimizer = _optimizer(
        arguments,
        list(wrapped),
        has_fused_adam=settings.kernel_family == "transformer_engine",
        rates=rates,
    )
    if device == "cuda":
        _fuse(torch_optimizers(optimizer))
    if settings.experts_are_fp8:
        from moe_bench.harness.kernels.fp8_grouped import forget_after_steps  # imports Triton

        forget_after_steps(torch_optimizers(optimizer), wrapped)
    _connect(config, ddp_config, wrapped, optimizer)
    return Training(config=config, chunks=wrapped, optimizer=optimizer)


def without_optimizer(
    config: TransformerConfig, chunks: tuple[torch.nn.Module, ...], *, device: Device
) -> Training:
    """The chunks in the recipe's precision and nothing that learning needs: no gradients, no buckets."""
    ready = _in_precision(config, chunks, device=device)
    return Training(
        config=config, chunks=tuple(chunk.requires_grad_(False) for chunk in ready), optimizer=None
    )


def _in_precision(
    config: TransformerConfig, chunks: tuple[torch.nn.Module, ...], *, device: Device
) -> tuple[torch.nn.Module, ...]:
    for chunk in chunks:
        for parameter in chunk.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        chunk.to(device)
    return tuple(Float16Module(config, chunk) for chunk in chunks) if config.bf16 else chunks


@contextlib.contextmanager
def _wrapping_stream(config: TransformerConfig) -> Iterator[None]:
    """Where CUDA graphs are captured, a stream of its own for what wrapping makes.

    Nodes that accumulate gradients remember the stream they were made on, and a capture may not wait for the
    default one; the whole iteration is captured on theirs (Megatron-LM, training/training.py:2517).
    """
    if config.cuda_graph_impl == "none":
        yield
        return
    is_whole = config.cuda_graph_impl == "full_iteration"
    stream = get_shared_capture_stream() if is_whole else torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def _wrap(
    chunks: tuple[torch.nn.Module, ...],
    config: TransformerConfig,
    ddp_config: DistributedDataParallelConfig,
    *,
    device: Device,
    gathers_in_step: bool,
) -> tuple[torch.nn.Module, ...]:
    """As Megatron-LM's training script does: of a rank's chunks the first alone is reduced in buckets, and
    none where weights are gathered under the optimizer's step.
    """
    is_whole = [gathers_in_step or index > 0 for index in range(len(chunks))]
    if not ddp_config.use_megatron_fsdp:
        return tuple(
            DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=whole)
            for chunk, whole in zip(chunks, is_whole, strict=True)
        )
    if device == "cpu":
        # A premultiplied sum is NCCL's (torch.distributed._make_nccl_premul_sum); gloo scales, then sums.
        ddp_config.gradient_reduce_div_fusion = False
    place = torch.device(device, torch.cuda.current_device() if device == "cuda" else None)
    return tuple(
        FullyShardedDataParallel(config, ddp_config, chunk, disable_bucketing=whole, device=place)
        for chunk, whole in zip(chunks, is_whole, strict=True)
    )


def _optimizer(
    arguments: MegatronArguments,
    chunks: list[torch.nn.Module],
    *,
    has_fused_adam: bool,
    rates: LearningRate | None,
) -> Any:
    """Megatron-Core's optimizer; with state in low precision its own needs Transformer Engine's FusedAdam."""
    options = _objects(arguments.optimizer)
    groups: dict[str, Any] = {}
    if rates is not None:
        options["min_lr"] = options["lr"] * rates.minimum_fraction
        groups["config_overrides"] = expert_overrides(options["lr"], rates)
    if has_fused_adam or not options["use_precision_aware_optimizer"]:
        return get_megatron_optimizer(OptimizerConfig(**options), chunks, **groups)
    plain = dict.fromkeys(("main_grads_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"), torch.float32)
    return low_precision_adam(
        OptimizerConfig(**options | plain | {"use_precision_aware_optimizer": False}),
        chunks,
        exp_avg_dtype=options["exp_avg_dtype"],
        exp_avg_sq_dtype=options["exp_avg_sq_dtype"],
        **groups,
    )


def _fuse(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """One kernel for torch's Adam; by itself it runs a dozen, and copies whole moments (`foreach`)."""
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.Adam):
            for group in optimizer.param_groups:
                group |= {"fused": True, "foreach": False}


def torch_optimizers(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    """The optimizers inside Megatron-Core's, one for each that it chains and that has parameters here."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is not None:
            yield part.optimizer


def _connect(
    config: TransformerConfig,
    ddp_config: DistributedDataParallelConfig,
    chunks: tuple[torch.nn.Module, ...],
    optimizer: Any,
) -> None:
    """Give the pipeline schedule its hooks, as Megatron-LM does (training/training.py:3530)."""

    def per_chunk(method: str) -> Any:
        hooks = [getattr(chunk, method) for chunk in chunks]
        return hooks if len(hooks) > 1 else hooks[0]

    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if ddp_config.overlap_grad_reduce:
        config.no_sync_func = per_chunk("no_sync")
        # As by default in Megatron-LM (align_grad_reduce): all pipeline ranks reduce at the same point.
        config.grad_sync_func = per_chunk("start_grad_sync")
    if ddp_config.overlap_param_gather and ddp_config.align_param_gather:
        config.param_sync_func = per_chunk("start_param_sync")


def _objects(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Plain arguments as Megatron-Core takes them."""
    objects = dict(arguments)
    for name in _DTYPE_FIELDS & objects.keys():
        objects[name] = _DTYPES[objects[name]]
    if "activation_func" in objects:
        objects["activation_func"] = _ACTIVATIONS[objects["activation_func"]]
    for name in ("recompute_modules", "moe_layer_freq", "cuda_graph_modules", "offload_modules"):
        # Megatron-Core tests these for being lists.
        if isinstance(objects.get(name), tuple):
            objects[name] = list(objects[name])
    return objects
