"""Counts what operators allocate, compute and call, as torch dispatches them.

Memory is counted by storage on the `meta` device, from the operator that makes it to the moment that Python
and autograd have let go of it, each rounded up to the caching allocator's unit. What a real run needs beyond
it (fragmentation, workspaces of libraries, buffers of NCCL, the CUDA context) is not here.
"""

from __future__ import annotations

import contextlib
import weakref
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_bench.harness.dryrun.operator_flops import FlopFormula, FlopKind, flop_formulas
from moe_bench.harness.dryrun.places import OUTSIDE, Phase, Places, Spot
from moe_bench.harness.substitution import Substitution, substituted

BLOCK_BYTES = 512
"""torch/c10, CUDACachingAllocator: kMinBlockSize."""


class Category(StrEnum):
    """What memory is held for."""

    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer states"
    INPUTS = "inputs"
    """Tokens, labels, positions and loss mask of all micro batches of a step."""
    ACTIVATIONS = "activations"
    """Made by a forward pass, kept for the backward pass or just passing."""
    RECOMPUTED = "recomputed"
    """Made again in the backward pass."""
    BACKWARD = "backward"
    """Gradients of activations and weights on their way."""
    PIPELINE = "pipeline"
    """Received from and sent to pipeline neighbours."""
    STEP = "optimizer step"
    """Temporaries of gradient clipping and of the update."""
    SYNC = "synchronisation"
    """Buffers of reductions and gathers beyond the gradients and weights themselves."""


_CATEGORY_OF: Mapping[Phase, Category] = {
    Phase.BUILD: Category.WEIGHTS,
    Phase.FORWARD: Category.ACTIVATIONS,
    Phase.RECOMPUTE: Category.RECOMPUTED,
    Phase.BACKWARD: Category.BACKWARD,
    Phase.PIPELINE: Category.PIPELINE,
    Phase.GRADIENT_SYNC: Category.SYNC,
    Phase.PARAMETER_SYNC: Category.SYNC,
    Phase.FINALIZE: Category.STEP,
    Phase.OPTIMIZER: Category.STEP,
}


class Role(Enum):
    """What an operator does to memory."""

    MAKES = auto()
    """Some output has a new storage."""
    WRITES = auto()
    """Works in place."""
    VIEWS = auto()
    """Names a part of what is there; launches nothing."""
    READS_BACK = auto()
    """Brings one number to the host."""


class Owner(NamedTuple):
    """What a storage is for, and the module that ran when it was taken."""

    category: Category
    module: str


@dataclass(slots=True)
class Held:
    """One storage that is alive."""

    num_bytes: int
    owner: Owner
    reference: weakref.ref[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The most that was held at once, and where."""

    num_bytes: int
    by_owner: Mapping[Owner, int]
    phase: Phase
    module: str


class Account(TorchDispatchMode):
    """Memory, FLOPs and operator calls of everything dispatched while it is entered."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.places = places
        self.flops: Counter[tuple[Phase, str, FlopKind]] = Counter()
        """By phase, module and kind."""
        self.num_calls: Counter[Phase] = Counter()
        """Operators that launch work on the device."""
        self.held: dict[int, Held] = {}
        self.total_bytes = 0
        self.timeline = array("q")
        """Bytes held after each operator that launches work."""
        self.peak_bytes_by_phase: dict[Phase, int] = defaultdict(int)
        self._category: Category | None = None
        self._by_owner: dict[Owner, int] = defaultdict(int)
        self._roles: dict[Any, tuple[Role, FlopFormula | None]] = {}
        self._peak_bytes = 0
        self._peak_spot = Spot(Phase.BUILD, OUTSIDE, None)
        self._peak_by_owner: dict[Owner, int] | None = {}
        """None while the peak is what is held now."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch would otherwise wrap every call of this mode, to keep a compiler out of it that is off."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operator and count it."""
        if any(issubclass(kind, DTensor) for kind in types):
            # It comes again for the part that this rank holds.
            return NotImplemented
        # The device mode would redirect what has arrived at its device, and say that it is not meta.
        with torch._C.DisableTorchFunction():  # type: ignore[no-untyped-call]
            return self._counted(func, args, kwargs)

    def _counted(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        role, formula = self._roles.get(func) or self._learn(func)
        if role is Role.READS_BACK and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype).item()
        output = func(*args, **kwargs) if kwargs else func(*args)
        if role is Role.VIEWS or not (made := _on_device(output) or _on_device(args)):
            return output
        spot = self.places.spot()
        if role is Role.MAKES:
            for tensor in made:
                self._hold(tensor, spot)
        self.num_calls[spot.phase] += 1
        self.timeline.append(self.total_bytes)
        if formula is not None:
            self.add_flops(formula.kind, formula.num_flops(args, output), spot)
        return output

    def add_flops(self, kind: FlopKind, num_flops: int, spot: Spot | None = None) -> None:
        """Count operations that no operator of torch stands for."""
        spot = spot or self.places.spot()
        self.flops[spot.phase, self.places.module(spot), kind] += num_flops

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Count until the block ends, storages that are resized in place included."""
        resize = torch.UntypedStorage.resize_

        def resize_and_count(storage: Any, num_bytes: int) -> Any:
            result = resize(storage, num_bytes)
            self._resized(storage)
            return result

        with substituted(Substitution(torch.UntypedStorage, "resize_", resize_and_count)), self:
            yield

    @contextlib.contextmanager
    def holding(self, category: Category) -> Iterator[None]:
        """Put what is allocated in the block into one category, whatever the phase."""
        before, self._category = self._category, category
        try:
            yield
        finally:
            self._category = before

    def assign(self, tensor: Tensor, category: Category) -> None:
        """Say what a storage is for, that was allocated as something else."""
        held = self.held[tensor.untyped_storage()._cdata]
        self._settle_peak()
        self._by_owner[held.owner] -= held.num_bytes
        held.owner = Owner(category, held.owner.module)
        self._by_owner[held.owner] += held.num_bytes

    def start_peak(self) -> None:
        """Look for the peak, and keep the timeline, from here on."""
        self._peak_bytes, self._peak_by_owner = self.total_bytes, None
        self._peak_spot = self.places.spot()
        self.peak_bytes_by_phase.clear()
        self.timeline = array("q")

    @property
    def peak(self) -> Peak:
        """The most that was held at once since `start_peak`."""
        self._settle_peak()
        return Peak(
            num_bytes=self._peak_bytes,
            by_owner=dict(self._peak_by_owner or {}),
            phase=self._peak_spot.phase,
            module=self.places.module(self._peak_spot),
        )

    @property
    def bytes_by_category(self) -> dict[Category, int]:
        """What is held now."""
        return bytes_by_category(self._by_owner)

    def _learn(self, func: Any) -> tuple[Role, FlopFormula | None]:
        """What an operator does, from its schema."""
        returns = func._schema.returns
        role = Role.MAKES
        if func is torch.ops.aten._local_scalar_dense.default:
            role = Role.READS_BACK
        elif not returns or all(result.alias_info is not None for result in returns):
            writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
            role = Role.WRITES if writes else Role.VIEWS
        self._roles[func] = role, flop_formulas().get(func)
        return self._roles[func]

    def _hold(self, tensor: Tensor, spot: Spot) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.held:
            return
        num_bytes = _rounded(storage.nbytes())
        reference = weakref.ref(storage, partial(self._release, key))
        held = self.held[key] = Held(0, self._owner(spot), reference)
        self._grow(held, num_bytes, spot)

    def _owner(self, spot: Spot) -> Owner:
        return Owner(self._category or _CATEGORY_OF[spot.phase], self.places.module(spot))

    def _shrink(self, held: Held, num_bytes: int) -> None:
        self._settle_peak()
        held.num_bytes -= num_bytes
        self._by_owner[held.owner] -= num_bytes
        self.total_bytes -= num_bytes

    def _grow(self, held: Held, num_bytes: int, spot: Spot) -> None:
        held.num_bytes += num_bytes
        self._by_owner[held.owner] += num_bytes
        self.total_bytes += num_bytes
        if self.total_bytes > self.peak_bytes_by_phase[spot.phase]:
            self.peak_bytes_by_phase[spot.phase] = self.total_bytes
        if self.total_bytes > self._peak_bytes:
            self._peak_bytes, self._peak_spot, self._peak_by_owner = self.total_bytes, spot, None

    def _release(self, key: int, reference: object) -> None:
        held = self.held.pop(key)
        self._shrink(held, held.num_bytes)

    def _resized(self, storage: Any) -> None:
        held = self.held.get(storage._cdata)
        if held is None:
            return
        change = _rounded(storage.nbytes()) - held.num_bytes
        if change < 0:
            self._shrink(held, -change)
            return
        spot = self.places.spot()
        if held.num_bytes == 0:
            owner = self._owner(spot)
            # Megatron-FSDP makes its buffers for gathered weights once, and fills and empties them in turn.
            is_reused = held.owner.category not in _MOVING
            held.owner = Owner(Category.SYNC, owner.module) if is_reused else owner
        self._grow(held, change, spot)

    def _settle_peak(self) -> None:
        """Note what the peak is made of before it is left."""
        if self._peak_by_owner is None:
            self._peak_by_owner = {
                owner: num_bytes for owner, num_bytes in self._by_owner.items() if num_bytes
            }


_MOVING = frozenset({Category.ACTIVATIONS, Category.RECOMPUTED, Category.BACKWARD})


def bytes_by_category(by_owner: Mapping[Owner, int]) -> dict[Category, int]:
    """Added up by what they are for, without what is zero."""
    total: dict[Category, int] = defaultdict(int)
    for owner, num_bytes in by_owner.items():
        total[owner.category] += num_bytes
    return {category: num_bytes for category, num_bytes in total.items() if num_bytes}


def _on_device(values: Any) -> list[Tensor]:
    """Tensors without data among the outputs or arguments of an operator."""
    if isinstance(values, Tensor):
        return [values] if values.is_meta else []
    if not isinstance(values, (tuple, list)):
        return []
    found = []
    for value in values:
        if isinstance(value, Tensor):
            if value.is_meta:
                found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _on_device(value)
    return found


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES
