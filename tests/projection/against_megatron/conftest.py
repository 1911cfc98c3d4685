"""Imports Megatron-Core quietly before any test here does."""

from moe_bench.harness.start import quiet_imports

with quiet_imports():
    import moe_bench.harness.measure  # noqa: F401  # so that no test meets its warnings
