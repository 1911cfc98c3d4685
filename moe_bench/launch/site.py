"""What is particular to one Slurm site: queue, account, containers, network; a file in `slurm/sites/`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from moe_bench.spec.base import PositiveInt, Spec, Text
from moe_bench.spec.load import UnknownNameError, shown, validated
from moe_bench.spec.yaml_tree import read_yaml

DEFAULT_SITE = "default"


class Site(Spec):
    """How jobs are asked for and started on one cluster. Nothing here may change what a recipe measures."""

    partition: Text | None = None
    """Null takes the submitting job's, or else the cluster's default; likewise `account`."""
    account: Text | None = None
    exclusive: bool = True
    """Whole nodes: a neighbour on the same node would be in the number."""
    gpu_request: Literal["gpus_per_node", "gres", "none"] = "gpus_per_node"
    """`--gpus-per-node=8`, `--gres=gpu:8`, or nothing where a node comes with its GPUs."""
    cpus_per_task: PositiveInt | None = None
    """Cores per rank; null leaves it to the cluster."""
    time_limit_s: PositiveInt = 3600
    """Asked for where no published step time tells how long the run will take."""
    submit_from_jobs: bool = True
    """False where the site forbids `sbatch` inside a job: the command to type is printed instead."""
    sbatch_args: tuple[Text, ...] = ()
    srun_args: tuple[Text, ...] = ()
    launcher: Literal["srun", "torchrun"] = "srun"
    """One task per GPU, or one torchrun per node (which turns every failing exit code into 1)."""
    runtime: Literal["bare", "pyxis", "apptainer"] = "bare"
    images: dict[str, Text] = Field(default_factory=dict)
    """Where the image lies for each name that a recipe's `container` may have."""
    default_container: Text | None = None
    """Name in `images` for recipes that name no container; null runs those in the bare environment."""
    container_mounts: tuple[Text, ...] = ()
    """`host:container` pairs beyond the working directory, which is always mounted."""
    env: dict[str, str] = Field(default_factory=dict)
    """Facts about the network that every rank must know, such as NCCL_SOCKET_IFNAME and NCCL_IB_HCA."""
    pass_environment: tuple[Text, ...] = ()
    """Variables of the submitting shell that a job keeps; all others are dropped."""


def load_site(path: Path) -> Site:
    """The site in `path`; RecipeError with file, line and key of every mistake."""
    return validated(read_yaml(path, shown_as=shown(path)), Site)


def find_site(folder: Path, *, asked: str | None, cluster: str | None) -> tuple[str, Site]:
    """Name and content of the site `asked` for: a file of `folder` (`slurm/sites`), or a path to a YAML file.

    With None, the file named after the Slurm `cluster` (`ClusterName` of slurm.conf) where there is one, else
    `default.yaml`. Raises UnknownNameError with the nearest names.
    """
    if asked is not None and asked.endswith((".yaml", ".yml")):
        return asked, load_site(Path(asked).resolve())
    if asked is None:
        asked = cluster if cluster is not None and (folder / f"{cluster}.yaml").is_file() else DEFAULT_SITE
    path = folder / f"{asked}.yaml"
    if not path.is_file():
        raise UnknownNameError("site", asked, sorted(known.stem for known in folder.glob("*.yaml")))
    return asked, load_site(path)
