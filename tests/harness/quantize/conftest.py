"""nvidia-modelopt imported quietly, where it is."""

from __future__ import annotations

import importlib.util

from moe_bench.harness.start import load_quantize

if importlib.util.find_spec("modelopt") is not None:
    load_quantize()
