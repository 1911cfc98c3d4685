"""Every change to Megatron-Core's own functions: what, why, where upstream, and whom it serves.

A patch names the function that it replaces by a hash of its source. When that source has changed, the patch
was written for something else, and the run stops instead of guessing.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from moe_bench.errors import BadInputError, MissingRequirementError
from moe_bench.harness.substitution import Substitution, substituted

Serves = Literal["host", "no_transformer_engine", "numbers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """One function of Megatron-Core and what stands in for it."""

    name: str
    what: str
    why: str
    upstream: str
    """File and line, or issue, of megatron-core 0.19.2."""
    serves: Serves
    """`host`: needed where there is no GPU, never applied where there is one. `no_transformer_engine`: mends
    a path that works only with Transformer Engine; changes no number, and is applied to the kernels of other
    families. `numbers`: corrects arithmetic, where a recipe names it."""
    module: str
    attribute: str
    """Name inside the module; `Class.method` for a method."""
    source_sha256: str
    replace: Callable[[Any], Any]
    """Makes the replacement from the original."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedPatch:
    """A patch that a run went through, as the record keeps it."""

    name: str
    serves: Serves
    what: str
    upstream: str


def patch_names(serves: Serves) -> tuple[str, ...]:
    """Names of the patches that serve this."""
    return tuple(patch.name for patch in PATCHES if patch.serves == serves)


@contextlib.contextmanager
def patches(names: Sequence[str]) -> Iterator[tuple[AppliedPatch, ...]]:
    """Hold the named patches until the block ends, and say which they are.

    Raises BadInputError for an unknown name, MissingRequirementError if the source that a patch replaces is
    not the one that it was written for.
    """
    known = {patch.name: patch for patch in PATCHES}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise BadInputError(f"patches: {', '.join(unknown)}: no such patch; there are {', '.join(known)}")
    wanted = [known[name] for name in dict.fromkeys(names)]
    with contextlib.ExitStack() as stack:
        for patch in wanted:
            owner, attribute = _place(patch)
            original = getattr(owner, attribute)
            _require_known_source(patch, original)
            stack.enter_context(substituted(Substitution(owner, attribute, patch.replace(original))))
        yield tuple(
            AppliedPatch(name=patch.name, serves=patch.serves, what=patch.what, upstream=patch.upstream)
            for patch in wanted
        )


def source_sha256(function: Callable[..., Any]) -> str:
    """Hash of a function's source text, without its indentation."""
    return hashlib.sha256(textwrap.dedent(inspect.getsource(function)).encode()).hexdigest()


def _place(patch: Patch) -> tuple[Any, str]:
    owner: Any = importlib.import_module(patch.module)
    *classes, attribute = patch.attribute.split(".")
    for name in classes:
        owner = getattr(owner, name)
    return owner, attribute


def _require_known_source(patch: Patch, original: Callable[..., Any]) -> None:
    found = source_sha256(original)
    if found != patch.source_sha256:
        raise MissingRequirementError(
            f"patch {patch.name}: {patch.module}.{patch.attribute} is not what it was written for "
            f"(source {found[:12]}, expected {patch.source_sha256[:12]}); install megatron-core 0.19.2"
        )


def _read_host_rng(original: Any) -> Any:
    def get(device: object = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    return get


def _write_host_rng(original: Any) -> Any:
    def write(new_state: torch.Tensor, device: object = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    return write


def _share_storage_in_python(original: Any) -> Any:
    def share(output: torch.Tensor, recomputed: torch.Tensor) -> None:
        # On the storage, not the tensor: autograd's version counter must not move.
        kept, source = output.untyped_storage(), recomputed.untyped_storage()
        kept.resize_(source.nbytes())
        kept.copy_(source)

    return lambda: share


def _no_fp8_unless_asked(original: Any) -> Any:
    def init(self: Any, fp8: object = None) -> None:
        original(self, fp8=fp8 or None)

    return init


def _count_rolled_tokens_over_context(original: Any) -> Any:
    def roll(tensor: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        rolled, count = original(tensor, *args, **kwargs)
        group = kwargs.get("cp_group")
        # Only the loss mask is a floating-point tensor; the counts of token ids and positions are not read.
        if count is None or group is None or group.size() == 1 or not count.is_floating_point():
            return rolled, count
        mean = count / group.size()
        torch.distributed.all_reduce(mean, group=group)
        return rolled, mean

    return roll


def _gather_experts_behind_their_step(original: Any) -> Any:
    def step_all(self: Any) -> bool:
        if not self.config.overlap_param_gather_with_optimizer_step:
            return bool(original(self))
        dense, *others = self.chained_optimizers
        (first_chunk,) = dense.model_chunks
        success = dense.step_with_ready_grads()
        for bucket_group in first_chunk.bucket_groups:
            first_chunk._start_bucket_group_param_sync(bucket_group, force_sync=False)
        for optimizer in others:
            success &= optimizer.step_with_ready_grads()
        for bucket_group in first_chunk.expert_parallel_bucket_groups:
            first_chunk._start_bucket_group_param_sync(bucket_group, force_sync=False)
        return bool(success)

    return step_all


PATCHES: tuple[Patch, ...] = (
    Patch(
        name="host_rng_read",
        what="reads the CPU's random state where Megatron-Core reads a GPU's",
        why="the original asks torch for CUDA's default generators, of which there are none",
        upstream="tensor_parallel/random.py:104",
        serves="host",
        module="megatron.core.tensor_parallel.random",
        attribute="_get_cuda_rng_state",
        source_sha256="aa26caaa069c5c4feff0f9f4e69f0f2ab6d6fc7940f71c3a6d0fe9303447d3dc",
        replace=_read_host_rng,
    ),
    Patch(
        name="host_rng_write",
        what="sets the CPU's random state where Megatron-Core sets a GPU's",
        why="the original leaves the call in torch's queue for the start of CUDA, which never comes",
        upstream="tensor_parallel/random.py:135",
        serves="host",
        module="megatron.core.tensor_parallel.random",
        attribute="_set_cuda_rng_state",
        source_sha256="b179c9d95438b61c1d9b58e8e13cc6534f2ae2f870d991c42438de53829ed398",
        replace=_write_host_rng,
    ),
    Patch(
        name="host_share_storage",
        what="copies a recomputed activation into the storage that was released",
        why="the original compiles a C++ extension at run time to share the storage instead",
        upstream="tensor_parallel/random.py:69",
        serves="host",
        module="megatron.core.tensor_parallel.random",
        attribute="_get_share_storage",
        source_sha256="c54b2aa28a0ac4115b70cab61391c922530fb56d2e1cb51f479a4a4bcd904822",
        replace=_share_storage_in_python,
    ),
    Patch(
        name="recompute_without_transformer_engine",
        what="selective recompute of norms and expert activations leaves FP8 alone unless it is used",
        why="`self.fp8 = fp8 is not None` turns the default False into True, and the FP8 state that it then"
        " asks for is Transformer Engine's",
        upstream="tensor_parallel/random.py:740",
        serves="no_transformer_engine",
        module="megatron.core.tensor_parallel.random",
        attribute="CheckpointWithoutOutput.__init__",
        source_sha256="186c4b0b401b4b8421c0705f262a0cdd1cf4bb773933286e3faef0691c49066f",
        replace=_no_fp8_unless_asked,
    ),
    Patch(
        name="mtp_token_count_under_cp",
        what="the multi-token prediction loss is divided by the mean number of tokens over the context group",
        why="each rank divides by its own count (line 889), and the last token is masked on one of them only:"
        " at 32 tokens over CP2 the gradient norm is off by up to 1.3 %",
        upstream="transformer/multi_token_prediction.py:235",
        serves="numbers",
        module="megatron.core.transformer.multi_token_prediction",
        attribute="roll_tensor",
        source_sha256="576f3fcb1c365bc92bcaea1d9253eb5014b6335f446c2a0f0b490587776ec426",
        replace=_count_rolled_tokens_over_context,
    ),
    Patch(
        name="expert_gather_with_step",
        what="experts that are gathered under the optimizer's step are gathered behind their own update",
        why="the first optimizer of a chain holds dense weights, and behind its step the first chunk's"
        " experts are gathered as well, which the last optimizer has yet to update: other"
        " expert-data-parallel ranks keep old ones",
        upstream="optimizer/optimizer.py:1643",
        serves="numbers",
        module="megatron.core.optimizer.optimizer",
        attribute="ChainedOptimizer._step",
        source_sha256="ec616e1da800e49fbf7359f7d91cf83713150cb71fba99e1ce262ed8190d0e49",
        replace=_gather_experts_behind_their_step,
    ),
)
