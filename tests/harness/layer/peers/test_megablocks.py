"""What MegaBlocks' layer is not asked for; that it agrees is a test for a GPU in test_agreement.py."""

import pytest
import torch

from moe_bench.harness.layer.peers import obstacles
from moe_bench.harness.layer.peers.megablocks import MegaBlocks
from tests.harness.layer.peers.cases import small_case


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("deepseek_v3", "its router has softmax, not sigmoid"),
        ("gpt_oss_20b", "its experts are SwiGLU, not clamped_swiglu"),
        ("qwen3_30b_a3b", "grouped_gemm's product is BF16"),
    ],
)
def test_it_says_which_layers_it_cannot_compute(model: str, reason: str) -> None:
    assert MegaBlocks().obstacle(small_case(model)) == reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_where_it_is_installed_it_asks_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    case = small_case("deepseek_v2_lite", precision="bf16")
    monkeypatch.setattr(obstacles, "find_spec", lambda name: None)
    assert str(MegaBlocks().obstacle(case)).startswith("not installed: pip install")
    monkeypatch.setattr(obstacles, "find_spec", lambda name: name)
    assert MegaBlocks().obstacle(case) == "its kernels run on a GPU"
