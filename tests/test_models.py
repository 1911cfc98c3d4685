"""The shipped models have the parameters that their authors publish; the systems fit their datasheets."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_bench.analysis.size import Counting, counted_size
from moe_bench.spec.catalogue import recipes_root
from moe_bench.spec.load import Loader
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.system import SystemSpec

LOADER = Loader(root=recipes_root())
MODELS = {
    path.parent.name: LOADER.model(path.parent.name) for path in sorted(LOADER.root.glob("*/model.yaml"))
}
SYSTEMS = {path.stem: LOADER.system(path.stem) for path in sorted(LOADER.root.glob("systems/*.yaml"))}
GPU_SYSTEMS = {key: system for key, system in SYSTEMS.items() if system.gpu is not None}
DOCS = Path(__file__).resolve().parents[1] / "docs" / "models.md"

ACTIVE_COUNTING = {
    "deepseek_v2_lite": Counting.WITHOUT_INPUT_EMBEDDING,
    "deepseek_v3": Counting.WITHOUT_INPUT_EMBEDDING,
    "glm_4_5_air": Counting.WITHOUT_EMBEDDINGS,
    "gpt_oss_120b": Counting.WITHOUT_INPUT_EMBEDDING,
    "gpt_oss_20b": Counting.WITHOUT_INPUT_EMBEDDING,
    "kimi_k2": Counting.WITHOUT_MTP,
    "mixtral_8x22b": Counting.WITHOUT_INPUT_EMBEDDING,
    "mixtral_8x7b": Counting.WITHOUT_MTP,
    "moonlight_16b_a3b": Counting.WITHOUT_MTP,
    **dict.fromkeys(
        (
            "olmoe_1b_7b",
            "olmoe_1b_7b_expert_choice",
            "olmoe_1b_7b_gshard",
            "olmoe_1b_7b_pr_moe",
            "olmoe_1b_7b_sinkhorn",
            "olmoe_1b_7b_switch",
        ),
        Counting.WITHOUT_MTP,
    ),
    "qwen3_235b_a22b": Counting.WITHOUT_MTP,
    "qwen3_30b_a3b": Counting.WITHOUT_MTP,
}
"""The way of counting that comes nearest to the published active parameters."""

CHECKPOINT_PARAMS = {
    "deepseek_v2_lite": 15_706_484_224,
    "deepseek_v3": 671_026_419_200,  # layers 0 to 60, embedding, head and final norm
    "glm_4_5_air": 110_468_824_832,
    "gpt_oss_120b": 116_829_156_672,
    "gpt_oss_20b": 20_914_757_184,
    "kimi_k2": 1_026_408_232_448,
    "mixtral_8x22b": 140_620_634_112,
    "mixtral_8x7b": 46_702_792_704,
    "olmoe_1b_7b": 6_919_161_856,
    "qwen3_235b_a22b": 235_093_634_560,
    "qwen3_30b_a3b": 30_532_122_624,
}
"""Elements of the weights on Hugging Face, scales of quantised weights left out (unpacked where packed)."""


def stored_params(model: ModelSpec) -> int:
    """Parameters as a checkpoint stores them: the trained ones and the expert bias of each expert layer.

    GLM-4.5-Air's holds its prediction layer too, with copies of embedding and head.
    """
    assert model.moe is not None
    num_expert_layers = model.num_layers - model.num_dense_layers
    size = counted_size(model)
    trained = size.total[Counting.WITHOUT_MTP]
    if model.key == "glm_4_5_air":
        num_expert_layers += 1
        trained += size.mtp_total + 2 * model.vocab_size * model.hidden_size
    return trained + num_expert_layers * model.moe.num_experts * model.moe.router.expert_bias


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_total_parameters_come_within_one_percent_of_the_published(model: ModelSpec) -> None:
    size = counted_size(model)
    # where no weights were released, the total is printed in billions
    rel = 0.01 if model.hf_id is not None else 0.03
    assert size.total[Counting.WITHOUT_MTP] == pytest.approx(size.published_total, rel=rel)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_active_parameters_come_within_eight_percent_of_the_published(model: ModelSpec) -> None:
    size = counted_size(model)
    if size.published_active is None:
        assert model.key not in ACTIVE_COUNTING
        return
    assert size.nearest_active is ACTIVE_COUNTING[model.key]
    assert size.active[size.nearest_active] == pytest.approx(size.published_active, rel=0.08)


@pytest.mark.parametrize(("key", "num_params"), CHECKPOINT_PARAMS.items())
def test_every_parameter_of_the_released_checkpoint_is_counted(key: str, num_params: int) -> None:
    assert stored_params(MODELS[key]) == num_params


def test_deepseek_v3s_prediction_module_has_the_size_of_its_weight_documentation() -> None:
    # README_WEIGHTS.md: 11.5e9 parameters of its own, embedding and head shared
    assert counted_size(MODELS["deepseek_v3"]).mtp_total == pytest.approx(11.5e9, rel=0.01)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_a_model_cites_its_published_configuration(model: ModelSpec) -> None:
    unreleased = "deepspeedai/Megatron-DeepSpeed, examples_deepspeed/MoE/"
    released = f"huggingface.co/{model.hf_id}, config.json"
    assert model.sources[0].startswith(unreleased if model.hf_id is None else released)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_a_model_has_a_dense_width_only_if_it_has_dense_layers(model: ModelSpec) -> None:
    assert (model.dense_ffn_hidden_size is not None) == (model.num_dense_layers > 0)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_latent_attention_rotates_neighbouring_dimensions_and_no_other_model_does(model: ModelSpec) -> None:
    assert model.rope.interleaved == (model.attention.kind == "mla")


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_a_model_with_an_expert_bias_moves_it(model: ModelSpec) -> None:
    assert model.moe is not None
    assert model.moe.router.expert_bias == (model.moe.router.expert_bias_update_rate > 0)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_the_documentation_prints_the_counted_size(model: ModelSpec) -> None:
    size = counted_size(model)
    counted = f"{size.total[Counting.WITHOUT_MTP] / 1e9:,.2f} | {size.active[size.nearest_active] / 1e9:.2f}"
    active = "-" if size.published_active is None else f"{size.published_active / 1e9:.4g}"
    published = f"{size.published_total / 1e9:,.5g} / {active}"
    row = f"| `{model.key}` | {published} | {counted} | {size.nearest_active} |"
    assert row in DOCS.read_text(encoding="utf-8")


@pytest.mark.parametrize("system", GPU_SYSTEMS.values(), ids=GPU_SYSTEMS.keys())
def test_a_gpu_computes_twice_as_fast_in_fp8_and_holds_less_than_is_sold(system: SystemSpec) -> None:
    gpu = system.gpu
    assert gpu is not None
    assert gpu.fp8_flops_per_s == pytest.approx(2 * gpu.bf16_flops_per_s, rel=1e-3)
    assert (gpu.fp4_flops_per_s is not None) == (gpu.architecture == "blackwell")
    assert 0.97 < gpu.usable_bytes / gpu.hbm_bytes < 1


@pytest.mark.parametrize("system", GPU_SYSTEMS.values(), ids=GPU_SYSTEMS.keys())
def test_nvlink_reaches_whole_nodes_and_outruns_the_network(system: SystemSpec) -> None:
    assert system.gpu is not None
    assert system.nic_bytes_per_s is not None
    assert system.nvlink_domain_gpus % system.gpus_per_node == 0
    assert system.gpu.nvlink_bytes_per_s > system.nic_bytes_per_s


def test_two_systems_with_different_facts_have_different_gpu_names() -> None:
    names = [system.gpu.device_name for system in GPU_SYSTEMS.values() if system.gpu is not None]
    assert len(set(names)) == len(names)


def test_an_h100_offers_the_79_gib_that_out_of_memory_messages_print() -> None:
    gpu = SYSTEMS["h100_sxm"].gpu
    assert gpu is not None
    assert gpu.usable_bytes / 2**30 == pytest.approx(79.1, abs=0.001)
