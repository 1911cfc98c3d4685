"""Which rank a process is and where its job meets: found by the launch layer, used by the harness."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Launcher = Literal["torchrun", "srun"]
"""What starts the ranks of a run that does not fork them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """One rank's place in a job."""

    rank: int
    world_size: int
    local_rank: int
    """Number of this process on its host."""
    master_addr: str
    master_port: int
