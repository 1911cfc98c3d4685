"""How `parity` starts the ranks of a run where it does not fork them, and the verb that each of them is."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_bench.cli.app import MODEL, app
from moe_bench.cli.options import rank_here
from moe_bench.errors import MeasurementError
from moe_bench.spec.catalogue import data_root

if TYPE_CHECKING:
    from moe_bench.harness.training.parity import Learn
    from moe_bench.launch.ranks import RankStarter
    from moe_bench.results.parity import ComparedRanks
    from moe_bench.spec.rendezvous import Launcher
    from moe_bench.spec.training import ComparedRun

VERB = "parity-rank"


@app.command(name=VERB, hidden=True, rich_help_panel=MODEL)
def parity_rank(
    run: Annotated[Path, typer.Argument(help="The run, as `parity` wrote it.")],
    out: Annotated[Path, typer.Argument(help="Where what it leaves goes.")],
) -> None:
    """Be one rank of a run that is compared; `parity` starts all of them."""
    from moe_bench.harness.start import quiet_imports
    from moe_bench.launch.environment import current_environment
    from moe_bench.launch.rendezvous import lone_rank
    from moe_bench.results.store import write_once
    from moe_bench.spec.training import ComparedRun

    compared = ComparedRun.model_validate_json(run.read_bytes())
    with quiet_imports():
        from moe_bench.harness.training.parity import learn_as_rank
    found = learn_as_rank(compared, run.parent, rank_here() or lone_rank(current_environment()))
    if found is not None:
        write_once(out, found)


def learn_by(starter: RankStarter, root: Path) -> Learn:
    """What has `starter` start the ranks of a run; they meet in a folder below `root`, gone afterwards."""

    def learn(run: ComparedRun) -> ComparedRanks:
        from moe_bench.results.parity import ComparedRanks
        from moe_bench.results.store import write_once

        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".parity-", dir=root) as name:
            folder = Path(name).resolve()
            job, found = write_once(folder / "run.json", run), folder / "found.json"
            starter.start(run.job.plan, VERB, (str(job), str(found)))
            if not found.is_file():
                raise MeasurementError(
                    f"{run.job.plan.asked}: its ranks ended and left nothing in {root}; is it a folder that "
                    "all nodes share?"
                )
            return ComparedRanks.model_validate_json(found.read_bytes())

    return learn


def starter_by(launcher: Launcher) -> RankStarter:
    """The starter on this machine, or in the job that this process is in."""
    from moe_bench.launch.environment import current_environment
    from moe_bench.launch.ranks import RankStarter
    from moe_bench.launch.runner import run_captured, run_live

    return RankStarter(
        launcher=launcher,
        data_root=data_root(),
        site=None,
        env=current_environment(),
        run=run_captured,
        run_live=run_live,
    )
