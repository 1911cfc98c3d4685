"""Provenance names what changes a number, and never a secret."""

import subprocess
from pathlib import Path

from moe_bench.results.provenance import git_state, installed_packages, operating_system, recorded_environment


def test_only_allowed_variables_are_recorded() -> None:
    environment = {
        "NCCL_NVLS_ENABLE": "0",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_USER": "somebody",
        "HOME": "/home/somebody",
        "HF_TOKEN": "hf_secret",
        "NCCL_API_KEY": "secret",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    assert set(recorded_environment(environment)) == {
        "NCCL_NVLS_ENABLE", "PYTORCH_CUDA_ALLOC_CONF", "SLURM_JOB_ID",
    }  # fmt: skip


def test_installed_packages_are_those_that_are_installed() -> None:
    packages = installed_packages()
    assert packages["megatron-core"].startswith("0.19")
    assert "deep-ep" not in packages


def test_a_checkout_knows_its_commit_and_whether_it_was_changed(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        done = subprocess.run(
            ["git", *identity, "-C", str(tmp_path), *words], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q", "-b", "main")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    state = git_state(tmp_path)
    assert (state.commit, state.branch, state.is_dirty) == (git("rev-parse", "HEAD"), "main", False)
    (tmp_path / "file").write_text("two")
    assert git_state(tmp_path).is_dirty is True


def test_a_folder_without_git_has_no_state(tmp_path: Path) -> None:
    state = git_state(tmp_path)
    assert (state.commit, state.branch, state.is_dirty) == (None, None, None)


def test_the_operating_system_is_one_line() -> None:
    assert operating_system()
    assert "\n" not in operating_system()
