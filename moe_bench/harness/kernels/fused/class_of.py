"""A built Megatron-Core object given the methods of one of our subclasses, as torch's parametrize does it."""

from __future__ import annotations

from typing import Any


def with_methods_of(kind: type, fused: type) -> Any:
    """The class between: `fused` itself for the class that it extends, else one that looks in `kind` first.

    Objects of a further subclass, such as a router that forces its choice, so keep what is theirs.
    """
    if kind is fused.__base__:
        return fused
    return type(f"Fused{kind.__name__}", (kind, fused), {})
