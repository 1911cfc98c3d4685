"""Work on all ranks of a recipe: forked from here without a GPU, or the one rank that this process is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_bench.errors import BadInputError, MissingRequirementError
from moe_bench.harness.mcore_config import megatron_arguments
from moe_bench.harness.requirements import require_no_graphs, require_runnable
from moe_bench.harness.settings import settings_of
from moe_bench.harness.start import load_quantize
from moe_bench.harness.workers import Message, Seat, run_forked
from moe_bench.spec.recipe import Recipe
from moe_bench.spec.rendezvous import Rendezvous


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rank is, and whom it tells."""

    rendezvous: Rendezvous
    listen_fd: int | None
    """Socket of forked ranks; None under a launcher."""
    tell: Callable[[Message], None]


def on_all_ranks[Result](
    recipe: Recipe,
    work: Callable[[Place], Result],
    *,
    rendezvous: Rendezvous | None,
    remedy: str,
    on_progress: Callable[[Any], None] = lambda content: None,
) -> Result:
    """What `work` returns on rank 0; `on_progress` is given the content of what ranks tell as progress.

    With a `rendezvous` this process is one rank and gets its own result. Without one, and without a GPU, the
    ranks are forked from this process, which must have one thread and must have run no tensor operation.

    Raises BadInputError, with `remedy`, where another number of ranks was started than the recipe has, and
    MissingRequirementError where something is not here.
    """
    arguments = megatron_arguments(recipe)
    require_runnable(arguments)
    require_no_graphs(arguments)
    settings = settings_of(arguments)
    if settings.quantization_format is not None:
        load_quantize()  # once, before any rank is forked
    if rendezvous is not None:
        if rendezvous.world_size != settings.world_size:
            raise BadInputError(
                f"{rendezvous.world_size} ranks were started and the recipe has {settings.world_size}; "
                f"start as many, or {remedy}"
            )

        def tell(message: Message) -> None:
            if message.kind == "progress":
                on_progress(message.content)

        return work(Place(rendezvous=rendezvous, listen_fd=None, tell=tell))
    if settings.device is not None:
        raise MissingRequirementError(
            f"{settings.world_size} GPU ranks need a launcher: start them with torchrun or srun"
        )

    def forked(seat: Seat) -> Result:
        return work(Place(rendezvous=seat.rendezvous, listen_fd=seat.listen_fd, tell=seat.send))

    first, *_ = run_forked(settings.world_size, forked, on_progress=on_progress)
    return first
