"""Toy layers on a GPU, through the command: every family that is installed is taken apart there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_bench.results.layer_record import LayerRecord, read_layer_record


def measured(tmp_path: Path, *options: str) -> list[LayerRecord]:
    command = (sys.executable, "-m", "moe_bench", "layer", "--json", "--out", str(tmp_path), *options)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [read_layer_record(Path(one["path"])) for one in json.loads(done.stdout)]


@pytest.mark.gpu("a CPU has no CUDA events, clocks and L2 to read")
@pytest.mark.parametrize("model", ["deepseek_v3", "gpt_oss_20b", "qwen3_30b_a3b"])
def test_a_toy_layer_is_taken_apart_by_cuda_events(tmp_path: Path, model: str) -> None:
    (found,) = measured(tmp_path, model, "--tiny", "--held-seconds", "1", "--peers", "textbook")
    assert found.provenance.gpu.name == torch.cuda.get_device_name()
    passes = {(part.part, part.in_pass) for part in found.parts}
    assert {(part, kind) for part in ("fc1", "fc2") for kind in ("forward", "dgrad", "wgrad")} <= passes
    assert found.peak_memory_bytes is not None
    assert found.held is not None
    assert found.peers is not None
    assert {one.outcome for one in found.peers.engines} == {"measured"}


@pytest.mark.gpu("Triton compiles for GPUs; here its interpreter runs the kernels")
def test_a_real_layer_runs_on_every_family_that_is_installed_on_its_fast_path(tmp_path: Path) -> None:
    found = measured(tmp_path, "--suite", "sonicmoe", "--tokens", "4096")
    engines = {one.engine for one in found}
    assert "megatron torch_native" in engines
    assert len(found) == 12 * len(engines)
    for one in found:
        assert one.case.kernels.fusions.activation
        assert not one.is_tiny
        for total_s, *parts_s in zip(
            one.marked.total_s, *(part.samples_s for part in one.parts), strict=True
        ):
            # events count in steps of half a microsecond
            assert sum(parts_s) <= 1.01 * total_s
