"""A comparison says of every engine what became of it, and divides only times of those that agree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from moe_bench.harness.layer.engine import BuiltLayer, Engine
from moe_bench.harness.layer.peers import obstacles
from moe_bench.harness.layer.peers.compare import comparable, compare_engines
from moe_bench.harness.layer.peers.deepspeed import DeepSpeed
from moe_bench.harness.layer.peers.huggingface import hugging_face_engines
from moe_bench.harness.layer.peers.textbook import Textbook
from moe_bench.harness.layer.weights import LayerWeights, draw_weights
from moe_bench.harness.timing import CudaClock
from moe_bench.results.layer_peers import LayerPeers
from moe_bench.spec.layer_case import LayerCase
from tests.harness.layer.peers.cases import published_case, small_case


@dataclass
class CountingClock:
    """Between two marks lie 10 ms, whatever was done; so a probe asks for ten samples."""

    is_cold = False
    num_marks: int = field(default=0)

    def mark(self) -> int:
        self.num_marks += 1
        return self.num_marks

    def between_s(self, start: int, end: int) -> float:
        return 0.01 * (end - start)

    def flush(self) -> None:
        pass


@dataclass(frozen=True)
class Doctored:
    """The textbook's loop with something done to its weights or its forward pass."""

    scale: float = 1.0
    error: Exception | None = None
    package: str = "torch"
    name: str = "doctored"

    def obstacle(self, case: LayerCase) -> str | None:
        return None

    @contextmanager
    def build(self, case: LayerCase, weights: LayerWeights, *, device: str) -> Iterator[BuiltLayer]:
        fc2 = weights.fc2.clone()
        fc2[3] *= self.scale
        with Textbook().build(case, replace(weights, fc2=fc2), device=device) as layer:
            yield layer if self.error is None else replace(layer, forward=self._fail)

    def _fail(self, x: Any) -> Any:
        raise self.error or AssertionError


def compared(model: str, engines: dict[str, Engine], **options: Any) -> LayerPeers:
    return compare_engines(
        small_case(model), engines, baseline="textbook", device="cpu", clock=CountingClock(), **options
    )


def test_an_engine_with_one_wrong_weight_disagrees_and_has_no_ratio() -> None:
    engines: dict[str, Engine] = {"textbook": Textbook(), "wrong": Doctored(scale=1.001)}
    peers = compared("qwen3_30b_a3b", engines, num_rounds=1)
    right, wrong = peers.engines
    assert (right.outcome, wrong.outcome) == ("measured", "disagrees")
    assert wrong.times is None
    assert peers.ratio("wrong", "forward") is None
    off = {one.tensor for one in wrong.differences if one.order() > peers.allowed_fraction}
    assert off == {"output", "input", "router", "fc1"}  # all but the gradient of the matrix itself
    assert wrong.reason is not None
    assert "output is" in wrong.reason
    assert "allowed 1e-05" in wrong.reason


def test_the_right_weights_agree() -> None:
    engines: dict[str, Engine] = {"textbook": Textbook(), "copy": Doctored()}
    peers = compared("deepseek_v3", engines, num_rounds=2)
    assert [one.outcome for one in peers.engines] == ["measured", "measured"]
    ratio = peers.ratio("copy", "forward and backward")
    assert ratio is not None
    assert (ratio.median_ratio, ratio.lowest_ratio, ratio.highest_ratio) == (1.0, 1.0, 1.0)
    assert LayerPeers.model_validate_json(peers.model_dump_json()) == peers


def test_an_engine_that_fails_is_out_and_the_others_go_on() -> None:
    failing = Doctored(error=RuntimeError("illegal instruction\nand a page of advice"))
    peers = compared("mixtral_8x7b", {"failing": failing, "textbook": Textbook()}, num_rounds=1)
    assert [one.outcome for one in peers.engines] == ["failed", "measured"]
    assert peers.engines[0].reason == "RuntimeError: illegal instruction"


def test_rounds_go_through_the_engines_forwards_then_backwards() -> None:
    said: list[str] = []
    engines: dict[str, Engine] = {"textbook": Textbook(), "copy": Doctored()}
    compared("mixtral_8x7b", engines, num_rounds=2, on_progress=said.append)
    assert said == [
        "textbook: agreement",
        "copy: agreement",
        "textbook: round 1 of 2",
        "copy: round 1 of 2",
        "copy: round 2 of 2",
        "textbook: round 2 of 2",
    ]


def test_engines_that_are_not_installed_are_named_with_the_line_that_installs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(obstacles, "find_spec", lambda name: None)
    engines: dict[str, Engine] = {one.name: one for one in hugging_face_engines()}
    peers = compared(
        "qwen3_30b_a3b", {"textbook": Textbook(), "deepspeed": DeepSpeed(), **engines}, num_rounds=1
    )
    absent = {one.engine: one.reason for one in peers.engines if one.outcome == "unable"}
    assert absent["deepspeed"] == 'not installed: pip install "deepspeed>=0.19"'
    assert absent["hf_qwen3_moe_eager"] == 'not installed: pip install "transformers>=5"'
    assert absent["hf_gpt_oss_eager"] == "its experts are clamped SwiGLU, not swiglu"


def test_what_peers_do_not_have_is_replaced_and_said() -> None:
    asked = published_case("deepseek_v3").model_copy(update={"precision": "fp8_blockwise"})
    case, changes = comparable(asked)
    assert (asked.ep_size, case.ep_size, case.precision) == (64, 1, "bf16")
    assert case.num_rows == asked.num_rows
    assert changes == (
        "the 4 experts of one of 64 ranks as a layer of their own: 16384 tokens with 2 experts each, in the "
        "place of 4096 with 8",
        "precision: bf16, for other engines do not have fp8_blockwise",
    )


def test_a_plain_layer_of_one_rank_is_compared_as_it_is() -> None:
    case = small_case("mixtral_8x7b")
    assert comparable(case) == (case, ())


@pytest.mark.gpu("a CPU's allocator has no peak to read")
def test_the_peak_on_a_gpu_contains_all_gradients() -> None:
    case = small_case("mixtral_8x7b")
    peers = compare_engines(
        case, {"textbook": Textbook()}, baseline="textbook", device="cuda", clock=CudaClock(), num_rounds=1
    )
    (textbook,) = peers.engines
    assert textbook.times is not None
    assert textbook.times.peak_bytes is not None
    gradients = draw_weights(case, device="cpu").named().values()
    assert textbook.times.peak_bytes >= sum(gradient.nbytes for gradient in gradients)
