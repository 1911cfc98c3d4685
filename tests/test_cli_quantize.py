"""The verb that quantises, where nvidia-modelopt is not installed."""

from __future__ import annotations

import importlib.util

import pytest

from moe_bench.cli import main


def test_without_modelopt_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["quantize", "qwen3_30b_a3b", "--scale", "smoke", "--format", "fp8"]) == 3
    assert "pip install 'moe_bench[modelopt]'" in capsys.readouterr().err
