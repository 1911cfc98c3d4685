"""The verb that quantises, where something that it needs is not here."""

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


def test_real_products_on_a_cpu_are_a_missing_requirement(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--format", "fp8", "--arithmetic", "real"]
    assert main(["quantize", "qwen3_30b_a3b", "--scale", "smoke", *asked]) == 3
    assert "cpu_host has no GPU" in capsys.readouterr().err
