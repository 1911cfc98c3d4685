"""torch.compile at the first call of a function instead of when its module is imported."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` compiled; the compiler itself (seconds to import) is loaded with the first one."""
    return torch.compile(function)
