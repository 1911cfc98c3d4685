"""Checkpoints of a training run: saved beside the training, whole or not at all, loaded into any layout."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.utils import unwrap_model
from torch import distributed
from torch.distributed.checkpoint import CheckpointException, FileSystemReader

from moe_bench.errors import BadInputError, MissingRequirementError
from moe_bench.harness.adapters import adapter_rank, is_adapter
from moe_bench.harness.build import Training
from moe_bench.harness.kernels.adam import StoredBf16Adam
from moe_bench.harness.training.fsdp_state import (
    fsdp_model_state,
    fsdp_optimizer_state,
    is_fsdp,
    take_up_fsdp,
)
from moe_bench.harness.training.writer_process import writers
from moe_bench.results.training_run import checkpoint_path, saved_steps

_UNFINISHED = ".unfinished"
_RESHARDABLE = "fully_reshardable"
"""Of the distributed optimizer's forms the one that every layout can read (distrib_optimizer.py)."""
ASYNC_STRATEGY = "mcore"
"""A forked writer of Megatron-Core's own; the default, nvrx, is a package of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stands."""

    num_steps: int
    """Steps that the saved weights have taken."""


class CheckpointWriter:
    """Saves on the side: the state is copied, and a process of its own writes while training goes on.

    A checkpoint is written under a name that begins with a dot and gets its own, `step-<n>`, when all ranks
    have written. Then those beyond the newest `num_kept` are removed.
    """

    def __init__(self, folder: Path, *, num_kept: int) -> None:
        self._folder, self._num_kept = folder, num_kept
        self._queue = AsyncCallsQueue()
        self._held = contextlib.ExitStack()
        self._writers = self._held.enter_context(writers())

    def save(self, training: Training, progress: Progress) -> None:
        """Begin to save; waits for the checkpoint before it. A collective call of all ranks."""
        self.finish()
        final = checkpoint_path(self._folder, progress.num_steps)
        unfinished = final.with_name(f".{final.name}{_UNFINISHED}")
        if distributed.get_rank() == 0:
            self._remove_unfinished()  # of a run that was killed here
            unfinished.mkdir(parents=True)
        distributed.barrier()
        _gather_weights(training)
        request = dist_checkpointing.save(
            _state(training, progress, is_loading=False),
            str(unfinished),
            content_metadata={"distrib_optim_sharding_type": _RESHARDABLE},
            async_sharded_save=True,
            async_strategy=ASYNC_STRATEGY,
            verify_integrity=True,
        )
        request.add_finalize_fn(lambda: self._name(unfinished, final))
        self._queue.schedule_async_request(self._writers.bound(request))

    def poll(self) -> None:
        """Give a checkpoint its name if all ranks have written it by now. A collective call of all ranks."""
        self._finalize(is_waiting=False)

    def finish(self) -> None:
        """Wait for what is being saved. A collective call of all ranks."""
        self._finalize(is_waiting=True)

    def close(self) -> None:
        """Wait, and end the writer."""
        self.finish()
        self._held.close()

    def _finalize(self, *, is_waiting: bool) -> None:
        try:
            self._queue.maybe_finalize_async_calls(blocking=is_waiting)
        except CheckpointException as error:  # raised on all ranks, with the reason on none of them
            said: list[tuple[str, ...]] = [()] * distributed.get_world_size()
            distributed.all_gather_object(said, self._writers.problems())
            reasons = [reason for one in said for reason in one]
            raise self._unwritten(reasons[0] if reasons else "a writer died") from error
        except OSError as error:  # of what rank 0 writes last
            raise self._unwritten(str(error)) from error

    def _unwritten(self, reason: str) -> MissingRequirementError:
        # torch's writer hides what the system said (caffe2/serialize/inline_container.cc, "unexpected pos")
        num_free_bytes = shutil.disk_usage(self._folder).free
        if distributed.get_rank() == 0:
            self._remove_unfinished()
        steps = saved_steps(self._folder)
        remedy = (
            f"step {steps[-1]} is whole: make room and go on with --resume"
            if steps
            else "there was none before: make room and begin anew"
        )
        return MissingRequirementError(
            f"{self._folder}: a checkpoint could not be written ({reason}; {num_free_bytes:,} bytes free); "
            f"{remedy}"
        )

    def _remove_unfinished(self) -> None:
        for unfinished in self._folder.glob(f".*{_UNFINISHED}"):
            shutil.rmtree(unfinished, ignore_errors=True)

    def _name(self, unfinished: Path, final: Path) -> None:
        if distributed.get_rank() == 0:
            unfinished.rename(final)
            for old in saved_steps(self._folder)[: -self._num_kept]:
                shutil.rmtree(checkpoint_path(self._folder, old))
        distributed.barrier()


def _gather_weights(training: Training) -> None:
    """Let every rank have all weights of the step. A collective call of all ranks.

    Where gathering overlaps with computing, an optimizer's step leaves a rank with those that it updated
    itself, and the next forward pass gathers the others (Megatron-LM does the same before it saves:
    megatron/training/training.py, force_param_sync).
    """
    if is_fsdp(training):
        return  # which saves what each rank updates itself
    overlapping = [chunk for chunk in training.chunks if chunk.ddp_config.overlap_param_gather]
    if overlapping:
        training.optimizer.prepare_model_params_for_param_sync()
    for chunk in overlapping:
        chunk.start_param_sync(force_sync=True)


def load_checkpoint(training: Training, path: Path, *, with_optimizer: bool = True) -> Progress:
    """Put what was saved in `path` into a model and its optimizer, whatever their layout is.

    A collective call of all ranks. Learning rate, weight decay and betas stay those of the optimizer as it
    was built. Without the optimizer its state is that of a fresh one over these weights.

    Raises BadInputError with the tensor's name where the checkpoint has none of that name or another shape,
    and where a file of it is damaged.
    """
    begins_adapters = _require_same_tensors(training, path)
    divides = training.optimizer is not None and is_fsdp(training)
    if with_optimizer and not divides:
        for part in _parts(training.optimizer):
            _make_state(part.optimizer)
    wanted = _state(training, Progress(num_steps=0), is_loading=True, with_optimizer=with_optimizer)
    if begins_adapters:
        wanted = _without_adapters(wanted)
    try:
        state = dist_checkpointing.load(wanted, str(path), verify_integrity=True)
    except (CheckpointingException, OSError, RuntimeError, ValueError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BadInputError(f"{path}: damaged or not whole ({first}); use another checkpoint") from error
    progress = Progress(num_steps=int(state["num_steps"]))
    if divides:
        take_up_fsdp(training, state, num_steps=progress.num_steps if with_optimizer else None)
        return progress
    for index, model in enumerate(_models(training)):
        model.load_state_dict(state[_model_key(training, index)], strict=not begins_adapters)
    if with_optimizer:
        _load_optimizer(training.optimizer, state["optimizer"], progress)
    elif training.optimizer is not None:
        training.optimizer.reload_model_params()
    return progress


def _without_adapters(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint from before the adapters has."""
    return {
        key: {name: entry for name, entry in value.items() if not is_adapter(name)}
        if key.startswith("model")
        else value
        for key, value in state.items()
    }


def _parts(optimizer: Any) -> list[Any]:
    """The optimizers of dense weights and of experts, or the only one."""
    return list(getattr(optimizer, "chained_optimizers", (optimizer,)))


def _make_state(inner: Any) -> None:
    """Zero moments for an Adam that has taken no step: DistributedOptimizer reads them before it loads."""
    for group in inner.param_groups:
        for parameter in group["params"]:
            if len(inner.state[parameter]) == 0:
                if isinstance(inner, StoredBf16Adam):
                    inner.initialize_state(parameter)
                else:
                    inner.state[parameter] = {
                        "step": torch.zeros(()),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def _load_optimizer(optimizer: Any, saved: dict[Any, Any], progress: Progress) -> None:
    """Take up the moments and main weights; groups of parameters stay as they were built.

    Megatron-Core looks for each group among those that were saved by its rates and by whether its experts
    are spread (optimizer.py, param_group_identifier_keys), and would not find it where one has changed.
    """
    parts = _parts(optimizer)
    for index, part in enumerate(parts):
        own = part.state_dict()
        there = saved if len(parts) == 1 else saved[index]
        for group in own["optimizer"]["param_groups"]:
            if "step" in group:
                group["step"] = progress.num_steps
        if "param_state" not in there:
            own["optimizer"]["state"] = there["optimizer"]["state"]
        part.load_state_dict(own)
        if "param_state" in there:
            with _without_steps(part.optimizer):
                part.load_parameter_state_from_fully_reshardable(there["param_state"])


@contextlib.contextmanager
def _without_steps(inner: Any) -> Iterator[None]:
    """Hide torch Adam's counts of steps while moments are loaded, then give each parameter one of its own.

    Megatron-Core's loader looks for every tensor of a parameter's state in the checkpoint, which has none of
    these (distrib_optimizer.py, _set_main_param_and_optimizer_states), and load_state_dict has left one
    tensor to all parameters, each of which would count it up. FusedAdam counts in its groups.
    """
    steps = [(state, state.pop("step")) for state in inner.state.values() if "step" in state]
    try:
        yield
    finally:
        for state, step in steps:
            state["step"] = step.clone()


def _models(training: Training) -> list[Any]:
    """The chunks without what wraps them, whose names would stand in those of the tensors."""
    return list(unwrap_model(list(training.chunks)))


def _model_key(training: Training, index: int) -> str:
    """As Megatron-LM's own checkpoints have them: one key, or one for each virtual stage."""
    return "model" if len(training.chunks) == 1 else f"model{index}"


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": _RESHARDABLE,
        # expert and dense weights are in one optimizer or in two, by the layout
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _model_state(training: Training) -> dict[str, Any]:
    if training.optimizer is not None and is_fsdp(training):
        return {"model": fsdp_model_state(training)}
    metadata = _metadata()
    return {
        _model_key(training, index): model.sharded_state_dict(metadata=metadata)
        for index, model in enumerate(_models(training))
    }


def _state(
    training: Training, progress: Progress, *, is_loading: bool, with_optimizer: bool = True
) -> dict[str, Any]:
    state: dict[str, Any] = _model_state(training)
    if with_optimizer and is_fsdp(training):
        state["optimizer"] = fsdp_optimizer_state(training)
    elif with_optimizer:
        state["optimizer"] = training.optimizer.sharded_state_dict(
            _flat(state), is_loading=is_loading, metadata=_metadata()
        )
    state["num_steps"] = progress.num_steps
    return state


def _flat(state: Mapping[str, Any]) -> dict[str, Any]:
    """The model as the optimizer wants it: the state of its only chunk, or those of all by their keys."""
    models = {key: value for key, value in state.items() if key.startswith("model")}
    return models["model"] if set(models) == {"model"} else models


def lora_rank(path: Path) -> int | None:
    """That of the adapters in a checkpoint; None where it has none."""
    return adapter_rank((key, getattr(entry, "size", ())) for key, entry in _saved(path).items())


def _saved(path: Path) -> Mapping[str, Any]:
    """What is known of every tensor of a checkpoint, by its key."""
    try:
        # not load_tensors_metadata of Megatron-Core 0.19, which trips over a field of torch 2.15's metadata
        metadata = FileSystemReader(str(path)).read_metadata()
    except (OSError, UnpicklingError, EOFError) as error:
        raise BadInputError(f"{path}: no whole checkpoint ({error}); name the folder of one") from error
    return cast(Mapping[str, Any], metadata.state_dict_metadata)


def _require_same_tensors(training: Training, path: Path) -> bool:
    """Compare names and global shapes of the model's weights with those that were saved.

    Whether the model has adapters that begin here, since the checkpoint has none.
    """
    saved = _saved(path)
    tensors = _tensors(_model_state(training))
    adapters = [tensor.key for tensor in tensors if is_adapter(tensor.key)]
    unknown = next((key for key in saved if is_adapter(key)), None)
    if unknown is not None and not adapters:
        raise BadInputError(
            f"{path}: {unknown}: the checkpoint has adapters and the model has none; go on with its run, or "
            "convert it to Hugging Face's format, which adds them to the weights"
        )
    for tensor in tensors:
        there = saved.get(tensor.key)
        if there is None and unknown is None and tensor.key in adapters:
            continue
        if there is None:
            raise BadInputError(f"{path}: {tensor.key}: the model has it and the checkpoint does not")
        if tuple(there.size) != tuple(tensor.global_shape):
            raise BadInputError(
                f"{path}: {tensor.key}: {list(there.size)} was saved and the model has "
                f"{list(tensor.global_shape)}; weights cannot follow that change"
            )
    return bool(adapters) and unknown is None


def _tensors(tree: Any) -> list[ShardedTensor]:
    if isinstance(tree, ShardedTensorFactory):
        tree = tree.build()
    if isinstance(tree, ShardedTensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        return [tensor for branch in tree for tensor in _tensors(branch)]
    return []
