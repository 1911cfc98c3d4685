"""Imports Megatron-Core quietly before any test here does."""

from moe_bench.harness.start import load_measure

load_measure()
