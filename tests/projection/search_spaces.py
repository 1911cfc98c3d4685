"""Spaces of layouts that tests of the search share."""

from __future__ import annotations

from functools import cache

from moe_bench.projection.search.base import Asked, search_base
from moe_bench.projection.search.legality import Legality
from moe_bench.projection.search.space import Space, search_space
from moe_bench.spec.catalogue import recipes_root
from moe_bench.spec.load import Loader

LOADER = Loader(root=recipes_root())
Indices = tuple[int, ...]


@cache
def space_of(
    model: str,
    num_gpus: int,
    *changes: str,
    system: str = "h100_sxm",
    precision: str | None = None,
    seq_len: int | None = None,
    global_batch_size: int | None = None,
    micro_batch_sizes: tuple[int, ...] = (1, 2),
) -> Space:
    asked = Asked(
        model=model,
        system=system,
        num_gpus=num_gpus,
        precision=precision,
        seq_len=seq_len,
        global_batch_size=global_batch_size,
        changes=changes,
    )
    base = search_base(asked, LOADER).recipe
    return search_space(base, micro_batch_sizes=micro_batch_sizes, pinned=asked.pinned)


def legal_families(space: Space) -> list[tuple[Indices, Indices]]:
    return list(Legality(space).legal_families())
