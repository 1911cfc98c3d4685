"""What can be said about a run without torch: source tree, packages, host, allow-listed environment."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from moe_bench.results.record import GitState

PACKAGES = (
    "moe_bench",
    "torch",
    "megatron-core",
    "transformer-engine",
    "transformer-engine-torch",
    "deep-ep",
    "deep_ep",
    "apex",
    "nvidia-modelopt",
    "transformers",
    "quack-kernels",
    "flash-attn",
    "flash-attn-3",
    "triton",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "numpy",
    "pydantic",
)
"""Packages that change a number; only those installed are recorded."""

_ENVIRONMENT = re.compile(
    r"^(NCCL_|NVTE_|CUDA_|CUBLAS|CUDNN_|TORCH_|PYTORCH_|OMP_NUM_THREADS$|NVSHMEM_|DEEP_?EP_|UCX_|GLOO_|"
    r"TRITON_|SLURM_(JOB_ID|JOB_NUM_NODES|NNODES|NTASKS|JOB_PARTITION|CLUSTER_NAME|RESTART_COUNT)$|"
    r"WORLD_SIZE$|LOCAL_WORLD_SIZE$)"
)
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|CRED", re.IGNORECASE)


def recorded_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that change a number, by allow-list; nothing that smells of a secret even then."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if _ENVIRONMENT.match(name) and not _SECRET.search(name)
    }


def job_id_here(environment: Mapping[str, str]) -> str:
    """`job<id>` of the Slurm job that this process is in, else `pid<id>` of the process."""
    job = environment.get("SLURM_JOB_ID")
    return f"job{job}" if job is not None else f"pid{os.getpid()}"


def installed_packages() -> dict[str, str]:
    """Versions of those of PACKAGES that are installed."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> GitState:
    """Commit, branch and cleanliness of the checkout that `folder` is the root of; nulls where it is none."""
    git = shutil.which("git")
    if git is None or not (folder / ".git").exists():
        return GitState(commit=None, branch=None, is_dirty=None)

    def ask(*words: str) -> str | None:
        done = subprocess.run([git, "-C", str(folder), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    status = ask("status", "--porcelain", "--untracked-files=no")
    return GitState(
        commit=ask("rev-parse", "HEAD"),
        branch=ask("rev-parse", "--abbrev-ref", "HEAD"),
        is_dirty=None if status is None else bool(status),
    )


def cpu_model() -> str | None:
    """The processor's own name, from /proc/cpuinfo; null elsewhere than on Linux."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return None
    match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), re.MULTILINE)
    return match.group(1) if match else None


def operating_system() -> str:
    """Kernel and distribution in one line."""
    release = Path("/etc/os-release")
    pretty = None
    if release.is_file():
        pretty = re.search(r'^PRETTY_NAME="?([^"\n]+)', release.read_text(encoding="utf-8"), re.MULTILINE)
    return f"{pretty.group(1) if pretty else platform.system()}, {platform.system()} {platform.release()}"
