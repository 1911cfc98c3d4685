"""Models without recipes have the parameters that their authors publish, and the operations others count."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_bench.analysis.flops import FlopsCounting, gflops_per_token
from moe_bench.analysis.size import Counting, counted_size
from moe_bench.results.published import load_rows
from moe_bench.spec.catalogue import data_root, model_of_row, recipes_root, reference_model_keys
from moe_bench.spec.load import Loader, UnknownNameError
from moe_bench.spec.model import ModelSpec

LOADER = Loader(root=recipes_root())
MODELS = {key: LOADER.model(key) for key in reference_model_keys(LOADER.root)}
DOCS = (Path(__file__).resolve().parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
WITHOUT_FACTS = {"DeepSeek-V4", "Llama-4-Behemoth (2T-A288B)", "OLMo-1.3B-dense (OLMoE paper)"}
"""Models of rows whose shape is not public; docs/models.md says why."""
LAYERS_ALONE = ("layer_microbench", "comm_microbench", "kernel_microbench")

CHECKPOINT_PARAMS = {
    "llama3_8b": 8_030_261_248,
    "llama3_1_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_1_70b": 70_553_706_496,
    "llama3_1_405b": 405_853_388_800,
    "qwen2_5_7b": 7_615_616_512,
    "qwen2_5_32b": 32_763_876_352,
    "qwen3_8b": 8_190_735_360,
    "nemotron_3_nano_4b": 3_973_556_832,
    "nemotron_3_5_lightning": 32_913_266_240,  # with 24 x 128 expert biases
    "nemotron_3_super_120b_a12b": 123_611_033_088,  # with 41 x 512 expert biases
    "nemotron_3_ultra_550b": (1_121_049_257_984 - 2 * 49 * 512) // 2,  # BF16, 49 x 512 biases in FP32
    "glm_5_2": 753_329_940_480,  # with 76 x 256 expert biases
}
"""Elements of the weights on Hugging Face, prediction modules included where they are stored: those of
Nemotron and GLM as Megatron-Bridge's model verification cards print them (commit 067f987df0), Ultra's from
the size of its index.
"""

IMPLIED_GFLOPS = (
    ("nemotron_3_nano_30b_a3b", 8192, 0, FlopsCounting.MCORE, 22.28),
    ("nemotron_3_5_lightning", 8192, 2, FlopsCounting.MCORE, 28.15),
    ("nemotron_3_super_120b_a12b", 8192, 2, FlopsCounting.MCORE, 84.7),
    ("nemotron_3_ultra_550b", 8192, 2, FlopsCounting.MCORE, 360.6),
    ("nemotron_3_nano_4b", 4096, 0, FlopsCounting.MCORE, 20.56),
    ("nemotron_3_nano_30b_a3b", 4096, 0, FlopsCounting.AUTOMODEL, 19.54),
    ("nemotron_3_super_120b_a12b", 4096, 0, FlopsCounting.AUTOMODEL, 74.27),
    ("deepseek_v4_flash", 4096, 1, FlopsCounting.MCORE, 90.8),
    ("glm_5_2", 2048, 1, FlopsCounting.MCORE, 285.95),
    ("glm_5_2", 4096, 1, FlopsCounting.MCORE, 304.0),
    ("llama_4_maverick_17b_128e", 8192, 0, FlopsCounting.DGXC, 108.86),
    ("grok_1_314b", 8192, 0, FlopsCounting.DGXC, 521.2),
    ("internal_352b", 8192, 0, FlopsCounting.MCORE, 282.5),
    ("llama3_8b", 8192, 0, FlopsCounting.MCORE, 51.47),
    ("llama3_70b", 8192, 0, FlopsCounting.MCORE, 447.4),
    ("llama3_1_405b", 8192, 0, FlopsCounting.MCORE, 2524.8),
    ("qwen3_8b", 4096, 0, FlopsCounting.MCORE, 49.03),
    ("deepseek_v3_16b", 4096, 0, FlopsCounting.TORCHTITAN, 18.1),
)
"""GFLOP per token that publishers imply: printed TFLOP/s over tokens/s, MFU and peak over tokens/s
(Internal-352B), or what a page says outright (dgxc-benchmarking). Rows of Qwen3.6 and Qwen3.8 count the
vision tower too, 0.55 GFLOP per token, and are left out.
"""


def stored_params(model: ModelSpec) -> int:
    """Parameters as a checkpoint stores them: the trained ones and the expert bias of each expert layer."""
    size = counted_size(model)
    moe = model.moe
    if moe is None or not moe.router.expert_bias:
        return size.total[Counting.WITH_MTP]
    modules = model.mtp_layers * model.num_mtp_modules(model.num_mtp_layers)
    num_expert_layers = sum(layer.ffn == "moe" for layer in model.layers + modules)
    return size.total[Counting.WITH_MTP] + num_expert_layers * moe.num_experts


@pytest.mark.parametrize(("key", "num_params"), CHECKPOINT_PARAMS.items())
def test_every_parameter_of_the_released_checkpoint_is_counted(key: str, num_params: int) -> None:
    assert stored_params(MODELS[key]) == num_params


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_total_parameters_come_within_a_percent_and_a_half_of_the_published(model: ModelSpec) -> None:
    size = counted_size(model)
    assert size.total[size.nearest_total] == pytest.approx(size.published_total, rel=0.015)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_active_parameters_come_within_nine_percent_of_the_published(model: ModelSpec) -> None:
    size = counted_size(model)
    assert size.active[size.nearest_active] == pytest.approx(size.published_active, rel=0.09)


@pytest.mark.parametrize(("key", "seq_len", "num_mtp_layers", "counting", "gflops"), IMPLIED_GFLOPS)
def test_operations_per_token_are_those_that_publishers_imply(
    key: str, seq_len: int, num_mtp_layers: int, counting: FlopsCounting, gflops: float
) -> None:
    counted = gflops_per_token(MODELS[key], seq_len=seq_len, num_mtp_layers=num_mtp_layers, counting=counting)
    assert counted == pytest.approx(gflops, rel=0.01)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_the_documentation_prints_the_counted_size(model: ModelSpec) -> None:
    size = counted_size(model)
    gflops = gflops_per_token(
        model, seq_len=4096, num_mtp_layers=model.num_mtp_layers, counting=FlopsCounting.MCORE
    )
    cells = (
        f"`{model.key}`",
        f"{size.published_total / 1e9:,.5g} / {size.published_active / 1e9:.4g}",
        f"{size.total[Counting.WITHOUT_MTP] / 1e9:,.2f}",
        f"{size.active[size.nearest_active] / 1e9:,.2f}",
        f"{gflops:,.2f}",
    )
    assert f"| {' | '.join(cells)} |" in DOCS


def test_every_row_that_trains_a_model_finds_it_unless_its_shape_is_not_public() -> None:
    unknown = set()
    for row in load_rows(data_root() / "results" / "published"):
        try:
            model_of_row(row.model, LOADER, num_layers=row.num_layers)
        except UnknownNameError:
            unknown |= set() if row.kind in LAYERS_ALONE else {row.model}
    assert unknown == WITHOUT_FACTS
    assert all(name.partition(" (")[0].partition(" ")[0] in DOCS for name in unknown)
