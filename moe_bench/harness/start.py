"""Loads torch and Megatron-Core without their warnings about packages that a recipe did not ask for.

What really ran is in the record, module by module; notices at import time say nothing about it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator

from moe_bench.errors import MissingRequirementError


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Import modules of the harness in the block; the first one takes several seconds."""
    noisy = logging.getLogger("torch.utils.cpp_extension")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        noisy.setLevel(level)


def require_package(name: str, *, extra: str) -> None:
    """Raise MissingRequirementError where a package of an optional extra is not installed."""
    if importlib.util.find_spec(name) is None:
        raise MissingRequirementError(f"{name} is not installed: pip install 'moe_bench[{extra}]'")


def load_quantize() -> None:
    """Import what puts in and reads quantisers; MissingRequirementError without modelopt."""
    require_package("modelopt", extra="modelopt")
    with quiet_imports():
        importlib.import_module("moe_bench.harness.quantize.program")  # which imports what calls this
