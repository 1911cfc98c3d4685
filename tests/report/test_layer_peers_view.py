"""The table of engines side by side, as a pipe gets it."""

from rich.console import Console

from moe_bench.report.layer_peers_view import layer_peers_json, layer_peers_view
from moe_bench.results.layer_peers import EngineResult, EngineTimes, LayerPeers, TensorDifference
from moe_bench.results.layer_samples import WholeSamples
from moe_bench.spec.layer_case import swiglu_case

EXPECTED = """\
peers: 8 tokens x 64, 4 experts, top-2, width 32; bf16; outputs and gradients of 4 tokens within 0.031 of float64
precision: bf16, for other engines do not have fp8_blockwise

engine        time / torch_native  lowest to highest  forward  forward ms  backward ms  peak GiB   off by  package
torch_native                 1.00       1.00 to 1.00     1.00       1.000        2.000      0.50  4.0e-03  torch 2.15.0
textbook                    10.00     10.00 to 10.00    12.00      12.000       18.000      1.50  4.0e-03  torch 2.15.0

hf_mixtral_grouped_mm: its experts are something else
hf_gpt_oss_*, hf_mixtral_eager: its experts are clamped SwiGLU, not swiglu
deepspeed: not installed: pip install deepspeed
megablocks (not installed): its router has softmax, not sigmoid
quack: disagrees: fc1 is 0.5 off; allowed 0.031
"""  # noqa: E501


def measured(engine: str, forward_s: float, backward_s: float, peak_bytes: int) -> EngineResult:
    samples = WholeSamples(forward_s=(forward_s,), backward_s=(backward_s,))
    return EngineResult(
        engine=engine,
        package="torch",
        version="2.15.0",
        outcome="measured",
        differences=(
            TensorDifference(tensor="fc1", difference_fraction=0.004),
            TensorDifference(tensor="output", difference_fraction=0.001),
        ),
        times=EngineTimes(rounds=(samples, samples), peak_bytes=peak_bytes),
    )


def left_out(engine: str, reason: str, *, version: str | None = "1", outcome: str = "unable") -> EngineResult:
    return EngineResult.model_validate(
        {"engine": engine, "package": "p", "version": version, "outcome": outcome, "reason": reason}
    )


PEERS = LayerPeers(
    case=swiglu_case("a", num_tokens=8, hidden_size=64, expert_ffn_hidden_size=32, num_experts=4, top_k=2),
    differences=("precision: bf16, for other engines do not have fp8_blockwise",),
    baseline="torch_native",
    num_checked_tokens=4,
    allowed_fraction=2.0**-5,
    engines=(
        measured("torch_native", 0.001, 0.002, 2**29),
        left_out("hf_mixtral_grouped_mm", "its experts are something else"),
        measured("textbook", 0.012, 0.018, 3 * 2**29),
        left_out("hf_gpt_oss_eager", "its experts are clamped SwiGLU, not swiglu"),
        left_out("deepspeed", "not installed: pip install deepspeed", version=None),
        left_out("hf_gpt_oss_grouped_mm", "its experts are clamped SwiGLU, not swiglu"),
        left_out("hf_mixtral_eager", "its experts are clamped SwiGLU, not swiglu"),
        left_out("megablocks", "its router has softmax, not sigmoid", version=None),
        left_out("quack", "fc1 is 0.5 off; allowed 0.031", outcome="disagrees"),
    ),
)


def test_ratios_come_first_and_those_left_out_stand_by_reason() -> None:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(layer_peers_view(PEERS))
    assert [line.rstrip() for line in capture.get().splitlines()] == EXPECTED.splitlines()


def test_json_has_the_ratios_of_both_passes_and_none_where_there_is_no_time() -> None:
    told = {one["engine"]: one["ratios"] for one in layer_peers_json(PEERS)}
    assert told["textbook"] == {
        "forward": {"median_ratio": 12.0, "lowest_ratio": 12.0, "highest_ratio": 12.0},
        "forward and backward": {"median_ratio": 10.0, "lowest_ratio": 10.0, "highest_ratio": 10.0},
    }
    assert told["quack"] == {"forward": None, "forward and backward": None}
