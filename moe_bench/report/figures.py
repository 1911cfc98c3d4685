"""Numbers as people read them, in tables and sentences, and the units in which they do."""

from __future__ import annotations

TERA, GIGA, MILLI, MICRO = 1e12, 1e9, 1e-3, 1e-6
GIB, MIB = 2**30, 2**20


def rate_text(tokens_per_s: float) -> str:
    """Four digits, and thousands as people write them."""
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 1000 else f"{tokens_per_s:.4g}"


def seconds_text(seconds: float) -> str:
    """Seconds with three decimals, or milliseconds with three digits."""
    return f"{seconds:.3f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def tflops_text(flops_per_s: float) -> str:
    """TFLOPs with one decimal."""
    return f"{flops_per_s / TERA:.1f}"


def steps_text(first: int, last: int) -> str:
    """`step 3`, or `steps 3 to 7`."""
    return f"step {last}" if first == last else f"steps {first} to {last}"


def tokens_text(num_tokens: float) -> str:
    """How much text a training reads, in trillions or billions of tokens."""
    unit, name = (TERA, "trillion") if num_tokens >= TERA else (GIGA, "billion")
    return f"{num_tokens / unit:,.4g} {name} tokens"
