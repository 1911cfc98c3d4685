"""What tells engines apart is read off rows and their software."""

from __future__ import annotations

import pytest

from moe_bench.projection.rows.engines import traits_of
from moe_bench.projection.rows.inference import InferredRun, infer
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
