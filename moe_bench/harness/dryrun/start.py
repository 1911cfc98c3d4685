"""Loads the dry run without the compiler and without warnings about packages that it stands in for."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.start import quiet_imports

if TYPE_CHECKING:
    from moe_bench.harness.dryrun.outcome import DryRun


def load_dry_run() -> Callable[..., DryRun]:
    """`moe_bench.harness.dryrun.stages.dry_run`, imported quietly; takes several seconds the first time.

    Megatron-Core compiles functions as it is imported, which loads torch's compiler for as long again.
    Nothing is compiled without data, so `torch.compile` returns what it is given meanwhile.

    Raises MissingRequirementError where torch or Megatron-Core is not installed.
    """
    for package in ("torch", "megatron.core"):
        if not _is_installed(package):
            raise MissingRequirementError(
                f"dryrun: {package} is not installed; `pip install torch megatron-core`"
            )
    with quiet_imports():
        import torch

        from moe_bench.harness.substitution import Substitution, substituted

        with substituted(Substitution(torch, "compile", _as_written)):
            from moe_bench.harness.dryrun import stages
    return stages.dry_run


def _is_installed(package: str) -> bool:
    parent, _, _ = package.rpartition(".")
    return (not parent or find_spec(parent) is not None) and find_spec(package) is not None


def _as_written(model: Any = None, **options: object) -> Any:
    """torch.compile, as a call or as a decorator with options, that compiles nothing."""
    return model if model is not None else _as_written
