"""What tells engines apart is read off rows and their software."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_bench.projection.rows.engines import traits_of
from moe_bench.projection.rows.inference import InferredRun, infer
from moe_bench.projection.step import project
from moe_bench.projection.work.operations import Part
from moe_bench.projection.work.traits import TORCHTITAN, Traits
from tests.projection.published_rows import CATALOGUE, ROWS


def traits(row_id: str) -> Traits:
    run = infer(next(row for row in ROWS if row.id == row_id), CATALOGUE)
    assert isinstance(run, InferredRun)
    return traits_of(run)


@pytest.mark.parametrize(
    ("row_id", "num_flushes"),
    [
        ("automodel-kimi-k2-h100-256gpu-bf16-s4096", 2),  # 16 micro batches, 8 to a local batch
        ("automodel-deepseek-v3-h100-1024gpu-bf16-s4096", 4),
        ("automodel-deepseek-v3-h100-256gpu-bf16-s4096", 1),
        ("dgxc-v25.05.05-deepseek-v3-h100-512gpu-bf16-s4096", 1),  # Megatron-Core
    ],
)
def test_torch_pipelines_empty_themselves_after_every_local_batch(row_id: str, num_flushes: int) -> None:
    assert traits(row_id).num_flushes == num_flushes


def test_latent_attention_is_unfused_on_blackwell_before_its_kernel_alone() -> None:
    assert not traits("dgxc-v25.05.05-deepseek-v3-gb200-128gpu-bf16-s4096").fuses_attention
    assert traits("dgxc-v25.05.05-deepseek-v3-h100-512gpu-bf16-s4096").fuses_attention
    assert traits("mb26.08-deepseek-v3-gb300-256gpu-mxfp8-s4096").fuses_attention


def test_torch_has_no_fast_kernel_for_latent_attention() -> None:
    latent = traits("torchtitan-deepseek-v3-h100-512gpu-bf16-s4096-deepep")
    assert latent.attention_fraction == TORCHTITAN.attention_fraction / 2
    assert traits("torchtitan-llama3-8b-h100-8gpu-bf16-s8192") == TORCHTITAN


def test_experts_of_transformer_engine_add_their_biases_in_the_product() -> None:
    assert traits("automodel-yaml-gpt-oss-120b-gb200-32gpu-mxfp8-s4096").fuses_expert_biases
    assert not traits("automodel-yaml-gpt-oss-120b-gb200-32gpu-bf16-s4096").fuses_expert_biases
    assert not traits("mb26.04-gpt-oss-120b-h100-64gpu-bf16-s4096").fuses_expert_biases


def test_modules_that_a_run_keeps_in_bf16_are_known() -> None:
    nvfp4 = traits("mb26.04-nemotron-3-super-120b-a12b-b200-64gpu-nvfp4-s8192")
    assert nvfp4.bf16_parts == {Part.ATTENTION_PROJECTIONS, Part.LATENT}
    assert not nvfp4.quantizes_mtp
    assert not traits("mb26.04-nemotron-3-super-120b-a12b-b200-64gpu-mxfp8-s8192").bf16_parts
    experts = "automodel-yaml-qwen3-30b-a3b-gb200-8gpu-mxfp8-s4096-experts-backend"
    assert traits(f"{experts}-torchao-mxfp8").bf16_parts == {Part.ATTENTION_PROJECTIONS}
    assert not traits(f"{experts}-te-mxfp8").bf16_parts


def test_bridge_25_11_binds_all_processes_of_a_gb300_tray_to_its_first_cpu() -> None:
    name = "llama3-70b-{}-64gpu-fp8-current-scaling-s8192"
    assert traits("mb25.11-" + name.format("gb300")).is_bound_to_first_cpu
    assert not traits("mb26.02-" + name.format("gb300")).is_bound_to_first_cpu
    assert not traits("mb25.11-" + name.format("gb200")).is_bound_to_first_cpu


def test_kernels_of_experts_differ_as_one_model_showed() -> None:
    """Two steps that differ in nothing else, by the utilization that Automodel's YAML prints."""
    row_id = "automodel-yaml-qwen3-30b-a3b-gb200-8gpu-bf16-s4096-experts-backend-te-te-attention"
    run = infer(next(row for row in ROWS if row.id == row_id), CATALOGUE)
    assert isinstance(run, InferredRun)
    deepseek = "automodel-yaml-deepseek-v3-gb200-64gpu-bf16-s4096-experts-backend"
    assert traits(f"{deepseek}-torch-mm-sdpa-torch.comp").experts_fraction == 0.88
    step_s = {
        backend: project(run.recipe, traits=replace(traits_of(run), experts_fraction=fraction)).step_s
        for backend, fraction in (("te", 1.0), ("gmm", 0.98), ("torch_mm", 0.88))
    }
    assert step_s["gmm"] / step_s["te"] == pytest.approx(26.27 / 26.12, abs=2e-3)
    assert step_s["torch_mm"] / step_s["te"] == pytest.approx(26.27 / 25.45, abs=2e-3)
