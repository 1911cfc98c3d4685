"""Loads torch and Megatron-Core without their warnings about packages that a recipe did not ask for.

What really ran is in the record, module by module; notices at import time say nothing about it.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

from moe_bench.errors import MissingRequirementError

if TYPE_CHECKING:
    from moe_bench.results.record import Record


def load_measure() -> Callable[..., Record | None]:
    """`moe_bench.harness.measure.measure`, imported quietly; takes several seconds the first time."""
    measure: Callable[..., Record | None] = _loaded("moe_bench.harness.measure").measure
    return measure


def load_calibrate() -> ModuleType:
    """`moe_bench.harness.calibrate.sweep`, imported quietly."""
    return _loaded("moe_bench.harness.calibrate.sweep")


def load_data() -> ModuleType:
    """`moe_bench.harness.data.build`, imported quietly."""
    return _loaded("moe_bench.harness.data.build")


def load_tokenizer() -> ModuleType:
    """`moe_bench.harness.data.tokenizer`, imported quietly."""
    return _loaded("moe_bench.harness.data.tokenizer")


def load_verify() -> ModuleType:
    """`moe_bench.harness.convert.verify`, imported quietly; MissingRequirementError without transformers."""
    require_package("transformers", extra="huggingface")
    return _loaded("moe_bench.harness.convert.verify")


def load_convert() -> ModuleType:
    """`moe_bench.harness.convert.convert`, imported quietly; MissingRequirementError without safetensors."""
    require_package("safetensors", extra="huggingface")
    return _loaded("moe_bench.harness.convert.convert")


def require_package(name: str, *, extra: str) -> None:
    """Raise MissingRequirementError where a package of an optional extra is not installed."""
    if importlib.util.find_spec(name) is None:
        raise MissingRequirementError(f"{name} is not installed: pip install 'moe_bench[{extra}]'")


def load_layer() -> ModuleType:
    """`moe_bench.harness.layer.bench`, imported quietly."""
    return _loaded("moe_bench.harness.layer.bench")


def load_layer_peers() -> ModuleType:
    """`moe_bench.harness.layer.peers.registry`, imported quietly; other people's packages are not."""
    return _loaded("moe_bench.harness.layer.peers.registry")


def load_training() -> ModuleType:
    """`moe_bench.harness.training.session`, imported quietly."""
    return _loaded("moe_bench.harness.training.session")


def load_evaluate() -> ModuleType:
    """`moe_bench.harness.training.evaluate`, imported quietly."""
    return _loaded("moe_bench.harness.training.evaluate")


def load_generate() -> ModuleType:
    """`moe_bench.harness.training.generate`, imported quietly."""
    return _loaded("moe_bench.harness.training.generate")


def load_parity() -> ModuleType:
    """`moe_bench.harness.training.parity`, imported quietly."""
    return _loaded("moe_bench.harness.training.parity")


def load_quantize() -> ModuleType:
    """`moe_bench.harness.quantize.program`, imported quietly; MissingRequirementError without modelopt."""
    require_package("modelopt", extra="modelopt")
    return _loaded("moe_bench.harness.quantize.program")


def _loaded(name: str) -> ModuleType:
    noisy = logging.getLogger("torch.utils.cpp_extension")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    finally:
        noisy.setLevel(level)
