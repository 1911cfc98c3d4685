"""Megatron-Core's own answer to a recipe, as it would give it on the recipe's machine: where it stops.

Asked in the order in which a rank would: `validate_args`, the config classes, `initialize_model_parallel`
on a fake store at the real world size, the layers of every stage, then the checks that expert layer, FSDP
and schedule make when they are built or first run. A GPU's properties, the pinned Transformer Engine and its
fused functions stand in; whatever only a missing package would refuse is no refusal here.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import io
import logging
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import megatron
import torch
import yaml
from megatron.core import parallel_state, utils
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.fsdp import mcore_fsdp_adapter
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.optimizer import OptimizerConfig
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.moe import moe_layer, moe_utils, shared_experts, token_dispatcher
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from packaging.version import Version
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_bench.errors import BadInputError
from moe_bench.harness.build import _objects, transformer_config
from moe_bench.harness.mcore_config import MegatronArguments, megatron_arguments
from moe_bench.spec.pipeline import pipeline_chunks
from moe_bench.spec.recipe import Recipe

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it tells that Transformer Engine is missing
    from megatron.training import arguments as training_arguments

ROOT = Path(megatron.__path__[0]).parent
PINS = Path(__file__).parents[2] / "containers" / "pins.yaml"

RENAMED = {
    "num_moe_experts": "num_experts",
    "gated_linear_unit": "swiglu",
    "num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
    "num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers",
}
"""Arguments of the command line that are called otherwise than the config field they fill."""

PACKAGES = (
    (moe_utils, ("fused_permute", "fused_permute_with_probs", "fused_sort_chunks_by_index",
                 "fused_sort_chunks_by_index_with_probs", "fused_unpermute")),
    (rope_utils, ("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd")),
)  # fmt: skip
"""Functions of Transformer Engine that Megatron-Core asks for by `is None`."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Where Megatron-Core stops, and what it says."""

    where: str
    """`megatron/...py:line` of the statement that raises."""
    message: str


@dataclass(frozen=True)
class Asked:
    """A recipe, as every part of Megatron-Core is asked about it."""

    recipe: Recipe

    @functools.cached_property
    def arguments(self) -> MegatronArguments:
        return megatron_arguments(self.recipe)

    @functools.cached_property
    def config(self) -> TransformerConfig:
        try:
            return transformer_config(self.arguments)
        except BadInputError as error:  # the harness puts Megatron-Core's refusal in one line
            raise (error.__cause__ or error) from None


def refusal(recipe: Recipe) -> Refusal | None:
    """The first thing in Megatron-Core that refuses `recipe`; None where all of it accepts."""
    asked = Asked(recipe)
    with on_the_machine(recipe):
        for ask in (_arguments, _configs, _process_groups, _stages, _expert_layer, _fsdp, _schedule):
            try:
                ask(asked)
            except (AssertionError, ImportError, NotImplementedError, RuntimeError, ValueError) as error:
                found = Refusal(_statement(error), str(error).replace("\n", " "))
                if not isinstance(error, ImportError) and "requires FusedAdam" not in found.message:
                    return found
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Megatron-Core's notices."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def on_the_machine(recipe: Recipe) -> Iterator[None]:
    """The recipe's GPU, environment and Transformer Engine, as far as the checks look at them."""
    gpu = recipe.system.gpu
    capability = tuple(int(part) for part in (gpu.compute_capability if gpu else "0.0").split("."))
    if gpu is None:
        capability = (10, 0)  # a machine without GPUs has no connections to order
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(quiet())
        enter(mock.patch.dict(os.environ, recipe.env, clear=False))
        for name in {"CUDA_DEVICE_MAX_CONNECTIONS", "NVTE_CPU_OFFLOAD_V1"} - recipe.env.keys():
            os.environ.pop(name, None)
        enter(mock.patch.object(torch.cuda, "get_device_capability", return_value=capability))
        enter(mock.patch.object(training_arguments, "get_device_arch_version", return_value=capability[0]))
        enter(mock.patch.object(utils, "_te_version", pinned_transformer_engine()))
        enter(mock.patch.object(training_arguments, "_print_args"))
        enter(mock.patch.object(utils, "get_pg_size", lambda group: group.size()))
        for module, names in PACKAGES:
            for name in names:
                enter(mock.patch.object(module, name, object()))
        yield


@functools.cache
def pinned_transformer_engine() -> Version:
    """The release in containers/pins.yaml."""
    pins = {pin["name"]: pin for pin in yaml.safe_load(PINS.read_text())}
    return Version(pins["transformer-engine"]["version"])


@functools.cache
def _defaults() -> argparse.Namespace:
    parser = training_arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return parser.parse_args([])


def _arguments(asked: Asked) -> None:
    training_arguments.validate_args(namespace(asked.recipe, asked.arguments))


def namespace(recipe: Recipe, arguments: MegatronArguments) -> argparse.Namespace:
    """What Megatron-LM's parser would have made of a command line with these arguments."""
    defaults = vars(_defaults())
    args = argparse.Namespace(
        **{
            name: value.copy() if isinstance(value, (list, dict)) else value
            for name, value in defaults.items()
        }
    )
    for section in (
        arguments.model,
        arguments.ddp,
        arguments.optimizer,
        arguments.training,
        arguments.transformer,
    ):
        for name, value in section.items():
            name = RENAMED.get(name, name)
            if hasattr(args, name):
                setattr(args, name, list(value) if isinstance(value, tuple) else value)
    parallel, is_fsdp = recipe.parallel, recipe.parallel.data_sharding == "megatron_fsdp"
    args.rank, args.world_size = 1, parallel.num_gpus
    args.max_position_embeddings = arguments.model["max_sequence_length"]
    args.num_virtual_stages_per_pipeline_rank = (
        parallel.virtual_pipeline if parallel.virtual_pipeline > 1 and parallel.layout is None else None
    )
    args.group_query_attention = recipe.model.attention.kind == "gqa"
    args.kv_channels = (
        args.kv_channels or 128
    )  # MLA has widths of its own; the script would derive an unused one
    args.untie_embeddings_and_output_weights = not recipe.model.tied_embeddings
    args.fp8_param_gather = bool(arguments.transformer.get("fp8_param"))
    args.fp4_param_gather = bool(arguments.transformer.get("fp4_param"))
    args.grad_reduce_in_bf16 = recipe.optimizer.gradient_dtype == "bf16"
    args.accumulate_allreduce_grads_in_fp32 = not args.grad_reduce_in_bf16
    args.check_for_nan_in_loss_and_grad = False
    args.mock_data, args.train_iters, args.min_lr = True, 50, 0.0
    # The formats with which each feature can be saved; nothing is.
    args.ckpt_format = "fsdp_dtensor" if is_fsdp else "torch"
    # A policy of Megatron-LM's script ("stability issues"), which the config class only warns of.
    args.cross_entropy_fusion_impl = "native"
    return args


def _configs(asked: Asked) -> None:
    recipe, arguments = asked.recipe, asked.arguments
    assert asked.config is not None
    DistributedDataParallelConfig(**_objects(arguments.ddp))
    OptimizerConfig(**_objects(arguments.optimizer))
    if recipe.parallel.num_optimizer_instances > 1 and not arguments.ddp["use_distributed_optimizer"]:
        # distributed_data_parallel.py:293 asks when a model is wrapped, which needs the model
        raise _PlaceError("megatron/core/distributed/distributed_data_parallel.py:293")


def _process_groups(asked: Asked) -> None:
    _initialized(asked.recipe.parallel.num_gpus, _sizes(asked))


def _sizes(asked: Asked) -> tuple[tuple[str, Any], ...]:
    sizes = dict(asked.arguments.parallel_state)
    sizes.pop("embedding_pipeline_ranks")  # a function of the ranks, not of the grid
    return tuple(sorted(sizes.items()))


@functools.cache
def _initialized(world_size: int, sizes: tuple[tuple[str, Any], ...]) -> None:
    """Every group at the real world size; grids come again and again, and what they say does not change."""
    with fake_ranks(world_size):
        parallel_state.initialize_model_parallel(**dict(sizes), create_gloo_process_groups=False)


@contextlib.contextmanager
def fake_ranks(world_size: int) -> Iterator[None]:
    """Process groups of `world_size` ranks that exchange nothing; this process is rank 0."""
    distributed.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        distributed.destroy_process_group()


def _stages(asked: Asked) -> None:
    built_layers(asked)


def built_layers(asked: Asked) -> list[tuple[int, int]]:
    """Decoder and MTP layers of every chunk as Megatron-Core counts them, in the order of a token's way."""
    recipe, config = asked.recipe, asked.config
    parallel, layout = recipe.parallel, config.pipeline_model_parallel_layout
    virtual = config.virtual_pipeline_model_parallel_size
    stages = [(rank, stage) for stage in range(virtual or 1) for rank in range(parallel.pipeline)]
    counts = []
    parallel_state.set_virtual_pipeline_model_parallel_world_size(virtual)
    try:
        for rank, stage in stages:
            parallel_state.set_pipeline_model_parallel_rank(rank)
            place = {"vp_stage": stage if virtual else None, "pp_rank": rank}
            num_mtp = recipe.num_mtp_layers * ((rank, stage) == stages[-1])
            if layout is not None:
                num_mtp = layout.get_num_layers_to_build(LayerType.mtp, **place)
            counts.append((get_num_layers_to_build(config, **place), num_mtp))
    finally:
        parallel_state.set_pipeline_model_parallel_rank(None)
        parallel_state.set_virtual_pipeline_model_parallel_world_size(None)
    return counts


def counted_layers(recipe: Recipe) -> list[tuple[int, int]]:
    """The same from our own layout."""
    chunks = pipeline_chunks(
        recipe.parallel, num_layers=recipe.model.num_layers, num_mtp_layers=recipe.num_mtp_layers
    )
    return [(len(chunk.layers), chunk.num_mtp_layers) for chunk in chunks]


def _expert_layer(asked: Asked) -> None:
    """The checks of an expert layer when it is built and first run, called without building one."""
    recipe, config = asked.recipe, asked.config
    parallel = recipe.parallel
    if recipe.model.moe is None:
        return
    layer = SimpleNamespace(training=True, attn_tp_group=_group(parallel.tensor), config=config, router=None)
    _until(moe_layer.MoELayer.forward, layer, torch.empty(0))
    groups = SimpleNamespace(
        ep=_group(parallel.expert), expt_tp=_group(parallel.expert_tensor),
        tp_ep=_group(parallel.expert * parallel.expert_tensor), tp=_group(parallel.tensor),
    )  # fmt: skip
    if config.moe_token_dispatcher_type == "flex":
        local = list(range(recipe.model.moe.num_experts // parallel.expert))
        dispatcher = token_dispatcher.MoEFlexTokenDispatcher.__new__(token_dispatcher.MoEFlexTokenDispatcher)
        _until(dispatcher.__init__, len(local), local, config, groups)
    is_ours = config.add_bias_linear  # harness/kernels/shared_experts.py builds what it refuses
    if config.moe_shared_expert_intermediate_size is not None and not is_ours:
        expert = shared_experts.SharedExpertMLP.__new__(shared_experts.SharedExpertMLP)
        _until(expert.__init__, config, None, False, groups)


def _fsdp(asked: Asked) -> None:
    """The meshes of Megatron-FSDP over fake groups of the real sizes."""
    recipe, config = asked.recipe, asked.config
    if recipe.parallel.data_sharding != "megatron_fsdp":
        return
    with fake_ranks(recipe.parallel.num_gpus):
        parallel_state.initialize_model_parallel(**dict(_sizes(asked)), create_gloo_process_groups=False)
        tensor, expert_tensor = (
            parallel_state.get_tensor_model_parallel_group(),
            parallel_state.get_expert_tensor_parallel_group(),
        )
        data = parallel_state.get_data_parallel_group(with_context_parallel=True)
        if recipe.parallel.num_optimizer_instances == 1:
            mcore_fsdp_adapter._get_dp_tp_mesh(data, tensor)
            mcore_fsdp_adapter._get_dp_tp_mesh(
                parallel_state.get_expert_data_parallel_group(), expert_tensor, ep_size=recipe.parallel.expert
            )
    if config.overlap_moe_expert_parallel_comm:
        ddp_config = DistributedDataParallelConfig(**_objects(asked.arguments.ddp))
        kind = mcore_fsdp_adapter.FullyShardedDataParallel
        with (
            mock.patch.object(kind, "_init_dist_index", return_value=None),
            mock.patch.object(kind, "_annotate_tensor_parallelism", return_value=None),
            mock.patch.object(mcore_fsdp_adapter, "MegatronFSDP", side_effect=_StoppedError),
        ):
            _until(kind.__new__(kind).__init__, config, ddp_config, None, device=torch.device("cpu"))


def _schedule(asked: Asked) -> None:
    """The interleaved schedule up to the point at which it would look at the model."""
    recipe, config = asked.recipe, asked.config
    parallel = recipe.parallel
    if parallel.virtual_pipeline == 1 or parallel.pipeline == 1:
        return
    groups = SimpleNamespace(tp=_group(parallel.tensor), cp=_group(parallel.context))
    chunk = torch.nn.Module()
    chunk.config = config
    chunks = [chunk] * parallel.virtual_pipeline
    communicator = SimpleNamespace(config=config, pp_group=_group(parallel.pipeline))
    zeros = torch.zeros
    with (
        # asked once on entry and once behind the checks
        mock.patch.object(schedules, "get_model_type", side_effect=[None, _StoppedError]),
        mock.patch.object(schedules, "paged_stash_reset"),
        mock.patch.object(schedules.torch, "zeros", lambda *size, device, **kinds: zeros(*size, **kinds)),
    ):
        _until(
            schedules.forward_backward_pipelining_with_interleaving,
            forward_step_func=None,
            data_iterator=[None] * len(chunks),
            model=chunks,
            num_microbatches=recipe.num_micro_batches,
            seq_length=recipe.seq_len,
            micro_batch_size=recipe.micro_batch_size,
            p2p_communicator=communicator,
            pg_collection=groups,
        )


class _StoppedError(Exception):
    """The part that was asked about has passed."""


class _PlaceError(AssertionError):
    """A refusal at a place that only a whole model reaches."""

    def __init__(self, where: str) -> None:
        self.where = where
        super().__init__(where)


def _until(call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Run `call` as far as the stand-ins carry it; what is not a refusal of Megatron-Core's is their end."""
    with contextlib.suppress(_StoppedError, AttributeError, TypeError, ImportError):
        call(*args, **kwargs)


def _group(size: int) -> Any:
    return SimpleNamespace(size=lambda: size, rank=lambda: 0)


def _statement(error: Exception) -> str:
    """The statement of Megatron-Core that raised, by its first line, however many lines it has."""
    if isinstance(error, _PlaceError):
        return error.where
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/megatron/" in frame.filename]
    frame = frames[-1]
    path = Path(frame.filename)
    return f"{path.relative_to(ROOT)}:{_first_line(path, frame.lineno or 0)}"


@functools.cache
def statements(path: Path) -> tuple[tuple[int, int, str], ...]:
    """First line, last line and kind of every statement of a file."""
    nodes = ast.walk(ast.parse(path.read_text()))
    found = (
        (node.lineno, node.end_lineno or 0, type(node).__name__)
        for node in nodes
        if isinstance(node, ast.stmt)
    )
    return tuple(sorted(found))


def _first_line(path: Path, line: int) -> int:
    inside = [(last - first, first) for first, last, _ in statements(path) if first <= line <= last]
    return min(inside)[1] if inside else line
