"""What a step holds past its use and sends more than once, found by trying rather than by knowing.

After the step nothing that a forward or backward pass made is needed any more. Each attribute of the model's
modules and dispatchers that still holds such a tensor is dropped, and what that frees is the finding. Gathers
of weights are found twice if one step fills the same memory from the other ranks more than once; weights that
are freed in between, as those of Megatron-FSDP's layers, are meant to be.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_bench.harness.dryrun.accounting import Account
from moe_bench.harness.dryrun.meta_device import has_values
from moe_bench.harness.dryrun.outcome import Finding
from moe_bench.harness.dryrun.places import Phase, Places, layer_of
from moe_bench.harness.loopback import Transfer

MIN_HELD_BYTES = 2**20
"""Less is not worth a line."""
Region = tuple[int, int, int]


class Findings:
    """Collects while a step runs, concludes after it."""

    def __init__(self, places: Places, *, frees_weights: bool) -> None:
        self._places = places
        self._frees_weights = frees_weights
        self._gathers: dict[str, Counter[Region]] = defaultdict(Counter)
        """Per group, how often each piece of memory was gathered into after the optimizer's update."""
        self._bytes: dict[Region, int] = {}

    def note(self, transfer: Transfer, phase: str) -> None:
        """Hear of one transfer."""
        if transfer.op != "all_gather" or phase != Phase.PARAMETER_SYNC or self._frees_weights:
            return
        for output in transfer.outputs:
            region = (output.untyped_storage()._cdata, output.storage_offset(), output.numel())
            self._gathers[transfer.group][region] += 1
            self._bytes[region] = output.numel() * output.element_size()

    def conclude(self, chunks: Sequence[torch.nn.Module], account: Account) -> tuple[Finding, ...]:
        """All findings of the step; drops what is held past its use."""
        return (*self._repeated_gathers(), *self._held_past_use(chunks, account))

    def _repeated_gathers(self) -> Iterator[Finding]:
        for group, counts in self._gathers.items():
            most = max(counts.values())
            if most > 1:
                extra = sum((count - 1) * self._bytes[region] for region, count in counts.items())
                yield Finding(
                    kind="repeated gather",
                    what=f"updated weights are gathered {most} times per step",
                    num_bytes=extra,
                    where=(group,),
                )

    def _held_past_use(self, chunks: Sequence[torch.nn.Module], account: Account) -> Iterator[Finding]:
        held: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for chunk in chunks:
            for module in chunk.modules():
                for owner, name in _passing_tensors(module):
                    before = account.total_bytes
                    setattr(owner, name, None)
                    freed = before - account.total_bytes
                    if freed >= MIN_HELD_BYTES:
                        layer = layer_of(self._places.name_of(module))
                        held[f"{type(owner).__name__}.{name}"].append((layer, freed))
        for what, parts in held.items():
            yield Finding(
                kind="held past use",
                what=f"{what} keeps tensors of the last micro batch until the next forward pass",
                num_bytes=sum(freed for _, freed in parts),
                where=tuple(dict.fromkeys(layer for layer, _ in parts)),
            )


def _passing_tensors(module: torch.nn.Module) -> list[tuple[Any, str]]:
    """Plain attributes of a module, and of the objects that it owns, which hold tensors of a pass."""
    owners = [module, *(value for value in vars(module).values() if _is_part(value))]
    return [
        (owner, name)
        for owner in owners
        for name, value in vars(owner).items()
        if isinstance(value, Tensor) and not has_values(value) and not isinstance(value, torch.nn.Parameter)
    ]


def _is_part(value: object) -> bool:
    """Whether an attribute is an object of Megatron-Core that is no module itself, such as a dispatcher."""
    return type(value).__module__.startswith("megatron.core.transformer.moe.") and hasattr(value, "__dict__")
