"""`moe-bench accuracy --memory` as a user meets it."""

from __future__ import annotations

import json

import pytest

from moe_bench.cli import main


def test_memory_is_held_against_both_sides_of_the_record(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["accuracy", "--memory", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["num_by_verdict"]["does not fit"] == 0
    assert data["num_ran"] == sum(data["num_by_verdict"].values())
    assert any(row["id"].startswith("oom-torchtitan-1789") for row in data["failed"])


def test_memory_fits_no_constants(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["accuracy", "--memory", "--cross-validate", "model"]) == 2
    assert "drop --cross-validate" in capsys.readouterr().err
