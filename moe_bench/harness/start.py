"""Loads torch and Megatron-Core without their warnings about packages that a recipe did not ask for.

What really ran is in the record, module by module; notices at import time say nothing about it.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_bench.results.record import Record


def load_measure() -> Callable[..., Record | None]:
    """`moe_bench.harness.measure.measure`, imported quietly; takes several seconds the first time."""
    noisy = logging.getLogger("torch.utils.cpp_extension")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module("moe_bench.harness.measure")
    finally:
        noisy.setLevel(level)
    measure: Callable[..., Record | None] = module.measure
    return measure
