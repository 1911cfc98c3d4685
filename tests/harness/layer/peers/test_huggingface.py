"""Which layers the blocks of transformers take, at published sizes too, and the order of GPT-OSS' rows."""

from importlib.util import find_spec

import pytest
import torch

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.layer.peers.compare import comparable
from moe_bench.harness.layer.peers.huggingface import HuggingFace, hugging_face_engines
from moe_bench.harness.layer.peers.huggingface_blocks import BLOCKS, halved, interleaved
from moe_bench.harness.layer.weights import draw_weights
from tests.harness.layer.peers import cases

MIXTRAL = next(block for block in BLOCKS if block.model == "mixtral")
needs_no_kernels = pytest.mark.skipif(
    torch.cuda.is_available() or find_spec("kernels") is not None, reason="this machine may have SonicMoE"
)


@pytest.mark.parametrize("model", cases.BLOCKS)
def test_the_published_layer_on_one_rank_is_taken_by_the_same_blocks(model: str) -> None:
    case, _ = comparable(cases.published_case(model))
    able = {engine.block.model for engine in hugging_face_engines() if engine.obstacle(case) is None}
    assert able == cases.BLOCKS[model]


def test_gate_and_linear_rows_stand_in_turn_in_gpt_oss() -> None:
    stacked = torch.tensor([[10, 11, 12, 20, 21, 22]])
    assert interleaved(stacked).tolist() == [[10, 20, 11, 21, 12, 22]]
    weights = torch.randn(3, 8, 5)
    assert torch.equal(halved(interleaved(weights)), weights)


def test_a_block_is_not_built_for_a_layer_that_it_does_not_compute() -> None:
    case = cases.small_case("deepseek_v3")
    engine = HuggingFace(MIXTRAL, "eager")
    with (
        pytest.raises(MissingRequirementError, match="hf_mixtral_eager: its router has softmax, not sigmoid"),
        engine.build(case, draw_weights(case, device="cpu"), device="cpu"),
    ):
        pass


def test_a_transformers_that_does_not_know_a_way_is_not_run_in_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = cases.small_case("mixtral_8x7b")
    engine = HuggingFace(MIXTRAL, "grouped_mm")
    monkeypatch.setattr("transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS", {})
    with (
        pytest.raises(MissingRequirementError, match="has no experts_implementation 'grouped_mm'"),
        engine.build(case, draw_weights(case, device="cpu"), device="cpu"),
    ):
        pass


@needs_no_kernels
@pytest.mark.parametrize(
    ("model", "precision", "reason"),
    [
        ("mixtral_8x7b", "fp32", "its products are BF16, not fp32"),
        ("mixtral_8x7b", "bf16", "its kernels run on a GPU"),
    ],
)
def test_sonicmoe_asks_for_bf16_and_a_gpu(model: str, precision: str, reason: str) -> None:
    case = cases.small_case(model, precision=precision)
    assert HuggingFace(MIXTRAL, "sonicmoe").obstacle(case) == reason
