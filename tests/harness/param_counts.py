"""Counts the parameters that Megatron-Core builds on every rank, in a process that forks the ranks.

Run as a module: reads pickled lists of arguments from its standard input, answers with their counts.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_bench.harness.mcore_config import MegatronArguments
    from moe_bench.harness.workers import Seat


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltParams:
    """What one rank of a job holds."""

    pipeline_rank: int
    dense: int
    expert: int


def count_built(jobs: Sequence[MegatronArguments]) -> list[list[BuiltParams]]:
    """Parameters on every rank of every job, built for real and not trained."""
    done = subprocess.run(
        (sys.executable, "-W", "ignore", "-m", "tests.harness.param_counts"),
        input=pickle.dumps(list(jobs)),
        stdout=subprocess.PIPE,
        check=True,
    )
    counts: list[list[BuiltParams]] = pickle.loads(done.stdout)
    return counts


def _count_rank(arguments: MegatronArguments, seat: Seat) -> BuiltParams:
    import torch
    from megatron.core import parallel_state

    from moe_bench.harness.build import model_chunks, set_seeds, transformer_config
    from moe_bench.harness.host_device import host_device
    from moe_bench.harness.patches import patch_names, patches
    from moe_bench.harness.process_groups import process_groups
    from moe_bench.harness.settings import settings_of

    torch.set_num_threads(1)
    wanted = (*patch_names("host"), *patch_names("no_transformer_engine"))
    with (
        host_device(),
        patches(wanted),
        process_groups(
            seat.rendezvous, backend="gloo", sizes=arguments.parallel_state, listen_fd=seat.listen_fd
        ),
    ):
        set_seeds(1)
        config = transformer_config(arguments)
        chunks = model_chunks(arguments, settings_of(arguments), config, device="cpu")
        counts = {True: 0, False: 0}
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                counts[".experts." in name] += parameter.numel()
        return BuiltParams(
            pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
            dense=counts[False],
            expert=counts[True],
        )


def _answer() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import moe_bench.harness.build  # noqa: F401  imported once, before any rank is forked
        from moe_bench.harness.settings import settings_of
        from moe_bench.harness.workers import run_forked
    jobs: list[MegatronArguments] = pickle.load(sys.stdin.buffer)
    answer = [
        run_forked(settings_of(job).world_size, partial(_count_rank, job), on_progress=lambda content: None)
        for job in jobs
    ]
    sys.stdout.buffer.write(pickle.dumps(answer))


if __name__ == "__main__":
    # forked ranks pickle BuiltParams by the name of its module, which is __main__ here
    from tests.harness import param_counts

    param_counts._answer()
