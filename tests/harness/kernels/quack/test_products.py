"""The stand-ins of these tests have the signatures of quack-kernels, and on a GPU its results."""

import importlib.util
import inspect
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_bench.harness.kernels.quack import products
from moe_bench.harness.kernels.quack.products import Gradient
from moe_bench.harness.kernels.quack.rows import ExpertRows, rows_of_routing_map
from moe_bench.harness.substitution import Substitution, substituted
from tests.harness.kernels.quack import plain_interface

HAS_QUACK = importlib.util.find_spec("quack") is not None
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of CUTLASS DSL, by quack
needs_quack = pytest.mark.skipif(not HAS_QUACK, reason="needs quack-kernels (pip install 'moe_bench[quack]')")


def parameters(function: Any) -> list[tuple[str, Any]]:
    return [(name, entry.default) for name, entry in inspect.signature(function).parameters.items()]


@needs_quack
@pytest.mark.parametrize("name", ["gemm", "gemm_gated", "gemm_dgated", "gemm_add_inplace"])
def test_the_stand_in_has_the_signature_of_the_package(name: str) -> None:
    assert parameters(getattr(plain_interface, name)) == parameters(getattr(products.interface(), name))


@needs_quack
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["90", "100"], ids=["hopper", "blackwell"])
def test_every_call_compiles_for_the_gpu(arch: str, tmp_path: Path) -> None:
    """Eight kernels for gathered rows and eight for rows in order; two minutes of one core, without a GPU."""
    target = {"QUACK_ARCH": arch, "CUTE_DSL_ARCH": f"sm_{arch}a", "QUACK_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-m", "tests.harness.kernels.quack.compiled"],
        env={**os.environ, **target, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    names = run.stdout.splitlines()
    assert len(names) == 16
    assert "gathered: up weight gradient, written" in names
    assert len(list(tmp_path.rglob("*.o"))) >= 8


def routed(device: str) -> tuple[ExpertRows, torch.Tensor]:
    chosen = torch.rand(256, 8).topk(2, dim=1).indices
    routing_map = torch.zeros(256, 8, dtype=torch.bool).scatter_(1, chosen, True).to(device)
    return rows_of_routing_map(routing_map, torch.rand(256, 8).to(device), top_k=2)


def every_product(rows: ExpertRows, probabilities: torch.Tensor, inputs: dict[str, Any]) -> list[Any]:
    """Outputs of the six products on the same inputs, each from its own inputs and not from one another."""
    up_grad = torch.empty_like(inputs["up"])
    added = torch.ones_like(inputs["down"], dtype=torch.float32)
    products.up_weight_gradient(
        inputs["x"], inputs["pairs"], rows, Gradient(tensor=up_grad, accumulates=False)
    )
    products.down_weight_gradient(inputs["x"], inputs["wide"], rows, Gradient(tensor=added, accumulates=True))
    return [
        *products.up(inputs["x"], inputs["up"], rows),
        products.down(inputs["wide"], inputs["down"], rows),
        *products.down_gradient(inputs["x"], inputs["down"], inputs["pairs"], probabilities, rows),
        products.up_input_gradient(inputs["pairs"], inputs["up"], rows),
        up_grad,
        added,
    ]


@pytest.mark.gpu("quack-kernels compiles for Hopper and Blackwell alone")
@needs_quack
def test_quack_computes_what_the_stand_in_does() -> None:
    """BF16 on the GPU against float64, as near as BF16 products are."""
    sizes = {
        "x": (256, 256),
        "up": (8, 512, 256),
        "down": (8, 256, 256),
        "pairs": (512, 512),
        "wide": (512, 256),
    }
    inputs = {name: (torch.randn(size) / 16).to("cuda", torch.bfloat16) for name, size in sizes.items()}
    tuned_rows, probabilities = routed("cuda")
    # quack's tuner compiles every configuration of every product, minutes of it.
    rows = replace(tuned_rows, is_static=False)
    found = every_product(rows, probabilities.float(), inputs)
    with substituted(Substitution(products, "interface", lambda: plain_interface)):
        exact = every_product(
            rows, probabilities.double(), {name: value.double() for name, value in inputs.items()}
        )
    for mine, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), truth.double(), rtol=3e-2, atol=3e-3)
