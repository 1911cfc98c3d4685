"""A toy quantised: what moves, what stays, that off is the model as it was, and every layout the same."""

from __future__ import annotations

import pytest

pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed: pip install 'moe_bench[modelopt]'")

from moe_bench.harness.quantize.program import Quantized
from moe_bench.spec.quantization import QuantizeJob
from tests.harness.quantize.jobs import alone, job_of, part, quantized, with_recipe
from tests.harness.zygote import Zygote

pytestmark = pytest.mark.filterwarnings("ignore")


def test_fewer_bits_move_the_model_further(zygote: Zygote) -> None:
    found = [quantized(zygote, alone(job_of("deepseek_v3", format=name))).report for name in ("fp8", "nvfp4")]
    assert 0 < found[0].kl_divergence < found[1].kl_divergence
    assert found[0].loss == found[1].loss
    assert found[0].original_bytes == found[1].original_bytes
    assert found[1].num_bytes < found[0].num_bytes < found[0].original_bytes


def test_prediction_modules_and_the_output_layer_stay(zygote: Zygote) -> None:
    found = quantized(zygote, with_recipe(alone(job_of("deepseek_v3", format="fp8")), num_mtp_layers=1))
    modules = [one for one in found.report.parts if one.name.startswith(("mtp.", "output_layer"))]
    assert {one.name.partition(".")[0] for one in modules} == {"mtp", "output_layer"}
    assert all(one.left_out_because and one.num_bytes == one.original_bytes for one in modules)
    assert part(found, "decoder.layers.*.self_attention.linear_kv_down_proj").left_out_because is None


def test_experts_only_leaves_every_other_weight(zygote: Zygote) -> None:
    found = quantized(zygote, alone(job_of("deepseek_v3", format="mxfp4", experts_only=True)))
    rounded = {one.name for one in found.report.parts if one.left_out_because is None}
    assert rounded == {f"decoder.layers.*.mlp.experts.linear_fc{number}" for number in (1, 2)}
    fc1 = part(found, "mlp.experts.linear_fc1")
    assert fc1.num_bytes == fc1.num_params // 2 + fc1.num_params // 32
    assert part(found, "shared_experts.linear_fc1").left_out_because == "not a routed expert"


def test_biases_of_experts_stay_beside_their_rounded_weights(zygote: Zygote) -> None:
    found = quantized(zygote, alone(job_of("gpt_oss_20b", format="mxfp4", experts_only=True)))
    fc2 = part(found, "mlp.experts.linear_fc2")
    assert fc2.left_out_because is None
    # 2 layers of 8 experts, each a weight [64, 32] in half a byte with a scale for 32, and a BF16 bias [64]
    assert fc2.num_bytes == 2 * 8 * (64 * 32 // 2 + 64 * 32 // 32 + 64 * 2)
    assert found.report.kl_divergence > 0


def in_fp32(recipe: str, format: str) -> QuantizeJob:
    job = job_of(recipe, format=format)
    optimizer = job.plan.recipe.optimizer.model_copy(update={"gradient_dtype": "fp32"})
    return with_recipe(job, precision="fp32", optimizer=optimizer)


def require_same(one: Quantized, other: Quantized) -> None:
    assert one.largest.keys() == other.largest.keys()
    for name, value in one.largest.items():
        assert value == pytest.approx(other.largest[name], rel=1e-5), name
    assert one.keys == other.keys
    by_name = [{part.name: part for part in found.report.parts} for found in (one, other)]
    assert by_name[0] == by_name[1]
    assert one.report.loss == pytest.approx(other.report.loss, rel=1e-6)
    assert one.report.quantized_loss == pytest.approx(other.report.quantized_loss, rel=1e-5)
    assert one.report.kl_divergence == pytest.approx(other.report.kl_divergence, rel=0.02)


def test_two_expert_ranks_find_what_one_process_finds(zygote: Zygote) -> None:
    job = in_fp32("gpt_oss_20b", "nvfp4")
    assert job.plan.recipe.parallel.expert == 2
    require_same(quantized(zygote, job), quantized(zygote, alone(job)))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["fp8", "nvfp4", "mxfp4"])
@pytest.mark.parametrize("recipe", ["qwen3_235b_a22b", "deepseek_v3"])
def test_tensor_pipeline_and_expert_ranks_find_what_one_process_finds(
    zygote: Zygote, recipe: str, format: str
) -> None:
    job = in_fp32(recipe, format)
    assert job.plan.num_ranks == 4
    require_same(quantized(zygote, job), quantized(zygote, alone(job)))
