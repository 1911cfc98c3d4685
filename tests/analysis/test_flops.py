"""FLOPs by hand, beside Megatron-Core's own counter, and beside what other suites' formulas give."""

import warnings
from argparse import Namespace
from collections.abc import Callable

import pytest

from moe_bench.analysis.flops import (
    CORE_ATTENTION,
    RULES,
    STATE_UPDATE,
    FlopsCounting,
    core_attention_flops,
    defines,
    forward_flops_by_part,
    gflops_per_token,
    lm_head_flops,
    norm_flops_as_product,
    router_flops,
    step_flops,
    step_flops_by_part,
)
from moe_bench.analysis.params import Part
from moe_bench.analysis.projection_flops import (
    gqa_projection_flops,
    mla_projection_flops,
    mlp_flops,
    mtp_projection_flops,
)
from moe_bench.errors import BadInputError
from moe_bench.spec.load import Loader
from moe_bench.spec.mixer import GroupedQueryAttention
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.recipe import Recipe
from tests.analysis.conftest import RecipeMaker

MegatronCounter = Callable[[Namespace, int], float]

MODELS = (
    "deepseek_v2_lite", "deepseek_v3", "glm_4_5_air", "gpt_oss_120b", "gpt_oss_20b", "kimi_k2",
    "mixtral_8x22b", "mixtral_8x7b", "moonlight_16b_a3b", "olmoe_1b_7b", "pr_moe_350m", "qwen3_235b_a22b",
    "qwen3_30b_a3b",
)  # fmt: skip


@pytest.fixture(scope="module")
def megatron_counter() -> MegatronCounter:
    """Megatron-Core's `num_floating_point_operations`; its import takes seconds and warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.training.training import num_floating_point_operations
    return num_floating_point_operations


def megatron_arguments(model: ModelSpec, *, seq_len: int, num_mtp_layers: int) -> Namespace:
    attention, moe = model.attention, model.moe
    assert moe is not None
    is_mla = attention.kind == "mla"
    return Namespace(
        seq_length=seq_len,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        padded_vocab_size=model.vocab_size,
        ffn_hidden_size=model.dense_ffn_hidden_size or moe.expert_ffn_hidden_size,
        moe_ffn_hidden_size=moe.expert_ffn_hidden_size,
        moe_shared_expert_intermediate_size=moe.shared_expert_ffn_hidden_size or None,
        moe_latent_size=None,
        num_experts=moe.num_experts,
        moe_router_topk=moe.top_k,
        moe_layer_freq=[int(model.is_moe_layer(layer)) for layer in range(model.num_layers)],
        mtp_num_layers=num_mtp_layers or None,
        swiglu=model.activation.is_gated,
        num_attention_heads=attention.num_heads,
        group_query_attention=not is_mla,
        num_query_groups=None if is_mla else attention.num_query_groups,
        kv_channels=None if is_mla else attention.head_dim,
        multi_latent_attention=is_mla,
        q_lora_rank=attention.q_lora_rank if is_mla else None,
        kv_lora_rank=attention.kv_lora_rank if is_mla else None,
        qk_head_dim=attention.qk_nope_head_dim if is_mla else None,
        qk_pos_emb_head_dim=attention.qk_rope_head_dim if is_mla else None,
        v_head_dim=attention.v_head_dim if is_mla else None,
        attention_output_gate=False,
        experimental_attention_variant=None,
        hybrid_layer_pattern=None,
    )


def sequence_flops(model: ModelSpec, *, seq_len: int, num_mtp_layers: int, counting: FlopsCounting) -> int:
    """Forward and backward of one sequence, small enough to be exact in Megatron-Core's floats."""
    forward = forward_flops_by_part(
        model, num_seqs=1, seq_len=seq_len, num_mtp_layers=num_mtp_layers, counting=counting
    )
    return 3 * sum(forward.values())


@pytest.mark.parametrize("with_mtp", [False, True])
@pytest.mark.parametrize("key", MODELS)
def test_megatron_counts_the_same_to_the_last_operation(
    models: dict[str, ModelSpec], megatron_counter: MegatronCounter, key: str, *, with_mtp: bool
) -> None:
    model = models[key]
    num_mtp_layers = model.num_mtp_layers if with_mtp else 0
    arguments = megatron_arguments(model, seq_len=4096, num_mtp_layers=num_mtp_layers)
    counted = sequence_flops(model, seq_len=4096, num_mtp_layers=num_mtp_layers, counting=FlopsCounting.MCORE)
    assert counted == megatron_counter(arguments, 1)


@pytest.mark.parametrize("key", MODELS)
def test_windows_take_away_exactly_the_scores_outside_them(models: dict[str, ModelSpec], key: str) -> None:
    model = models[key]
    whole, windowed = (
        sequence_flops(model, seq_len=4096, num_mtp_layers=0, counting=counting)
        for counting in (FlopsCounting.MCORE, FlopsCounting.MCORE_WINDOWED)
    )
    attention = model.attention
    if not isinstance(attention, GroupedQueryAttention) or attention.sliding_window is None:
        assert whole == windowed
        return
    # GPT-OSS: every second layer sees 128 tokens: 128 x 4096 less the missing corner of 127 x 128 / 2 pairs
    pairs_outside = 4096 * 4096 // 2 - (4096 * 128 - 127 * 128 // 2)
    assert whole - windowed == 3 * (model.num_layers // 2) * 4 * 64 * 64 * pairs_outside


@pytest.mark.parametrize(
    ("key", "num_mtp_layers", "gflops"),
    [
        ("deepseek_v3", 0, 249.81),
        ("deepseek_v3", 1, 259.99),
        ("deepseek_v2_lite", 0, 16.39),
        ("moonlight_16b_a3b", 0, 17.15),
        ("kimi_k2", 0, 204.48),
        ("qwen3_30b_a3b", 0, 23.01),
        ("qwen3_235b_a22b", 0, 148.03),
        ("mixtral_8x7b", 0, 79.71),
        ("mixtral_8x22b", 0, 242.17),
        ("olmoe_1b_7b", 0, 7.87),
        ("glm_4_5_air", 1, 96.38),
    ],
)
def test_gflops_per_token_at_4096_match_known_values(
    models: dict[str, ModelSpec], key: str, num_mtp_layers: int, gflops: float
) -> None:
    counted = gflops_per_token(
        models[key], seq_len=4096, num_mtp_layers=num_mtp_layers, counting=FlopsCounting.MCORE
    )
    assert counted == pytest.approx(gflops, abs=0.005)


@pytest.mark.parametrize(
    ("key", "counting", "at_4096", "at_131072"),
    [
        # obtained by running each suite's own function: Megatron-LM d98e8a6, Megatron-Bridge 067f987, and
        # Automodel 36044ad, and by restating torchtitan b5bcd76
        ("gpt_oss_120b", FlopsCounting.MCORE, 34.3, 146.7),
        ("gpt_oss_120b", FlopsCounting.MCORE_WINDOWED, 32.6, 88.8),
        ("gpt_oss_120b", FlopsCounting.AUTOMODEL, 32.6, 88.8),
        ("gpt_oss_120b", FlopsCounting.TORCHTITAN, 38.0, 262.7),
        ("deepseek_v3", FlopsCounting.MCORE, 260.0, 1227.4),
        ("deepseek_v3", FlopsCounting.AUTOMODEL, 249.8, 1201.6),
        ("deepseek_v3", FlopsCounting.TORCHTITAN, 281.2, 2184.7),
        ("kimi_k2", FlopsCounting.TORCHTITAN, 220.8, 1172.6),
        ("qwen3_30b_a3b", FlopsCounting.MCORE, 23.0, 172.8),
        ("qwen3_30b_a3b", FlopsCounting.TORCHTITAN, 27.9, 327.5),
        ("qwen3_235b_a22b", FlopsCounting.TORCHTITAN, 167.3, 1340.6),
        ("mixtral_8x7b", FlopsCounting.MCORE, 79.7, 179.6),
        ("mixtral_8x7b", FlopsCounting.TORCHTITAN, 82.9, 282.7),
    ],
)
def test_each_convention_gives_what_its_suite_gives(
    models: dict[str, ModelSpec], key: str, counting: FlopsCounting, at_4096: float, at_131072: float
) -> None:
    model = models[key]
    for seq_len, expected in ((4096, at_4096), (131_072, at_131072)):
        counted = gflops_per_token(
            model, seq_len=seq_len, num_mtp_layers=model.num_mtp_layers, counting=counting
        )
        assert counted == pytest.approx(expected, abs=0.055)


def test_forgetting_the_gate_gives_the_old_number_of_gpt_oss(models: dict[str, ModelSpec]) -> None:
    # 27.1 GFLOP per token: Megatron-Bridge's tables before its pull request 3947
    counted = gflops_per_token(
        models["gpt_oss_120b"],
        seq_len=4096,
        num_mtp_layers=0,
        counting=FlopsCounting.MCORE_UNGATED_EXPERTS,
    )
    assert counted == pytest.approx(27.1, abs=0.1)


@pytest.mark.parametrize(
    ("shape", "seq_len", "flops"),
    [
        # dgxc-benchmarking, llama4/pretrain/README.md: 8.92e14 (its embedding term is rounded, 0.02 % low)
        ((48, 5120, 202_048, 40, 8, 16_384, 1), 8192, 8.92e14),
        # grok1/README.md prints 4.27E+15 for 64 layers of 6144
        ((64, 6144, 128_256, 48, 8, 32_768, 2), 8192, 4.27e15),
    ],
)
def test_the_closed_formula_of_dgxc_gives_what_its_pages_print(
    models: dict[str, ModelSpec], shape: tuple[int, ...], seq_len: int, flops: float
) -> None:
    layers, hidden, vocab, heads, groups, ffn, top_k = shape
    mixtral = models["mixtral_8x7b"]
    assert mixtral.moe is not None
    model = mixtral.model_copy(
        update={
            "num_layers": layers,
            "hidden_size": hidden,
            "vocab_size": vocab,
            "attention": mixtral.attention.model_copy(
                update={"num_heads": heads, "num_query_groups": groups}
            ),
            "moe": mixtral.moe.model_copy(update={"expert_ffn_hidden_size": ffn, "top_k": top_k}),
        }
    )
    counted = sequence_flops(model, seq_len=seq_len, num_mtp_layers=0, counting=FlopsCounting.DGXC)
    assert counted == pytest.approx(flops, rel=0.0015)


def test_the_closed_formula_of_dgxc_agrees_where_heads_fill_the_hidden_size(
    models: dict[str, ModelSpec],
) -> None:
    mixtral = models["mixtral_8x22b"]
    dgxc, megatron = (
        sequence_flops(mixtral, seq_len=4096, num_mtp_layers=0, counting=counting)
        for counting in (FlopsCounting.DGXC, FlopsCounting.MCORE)
    )
    assert dgxc == megatron


def test_the_closed_formula_of_dgxc_refuses_latent_attention(models: dict[str, ModelSpec]) -> None:
    with pytest.raises(BadInputError, match="knows whole layers of grouped-query attention only"):
        gflops_per_token(models["kimi_k2"], seq_len=4096, num_mtp_layers=0, counting=FlopsCounting.DGXC)


def test_every_convention_has_a_rule() -> None:
    assert set(RULES) == set(FlopsCounting)


def test_grouped_query_projections_match_a_hand_count() -> None:
    # Qwen3-30B-A3B, one token: 2 x 18,874,368 parameters
    flops = gqa_projection_flops(tokens=1, hidden=2048, num_heads=32, num_query_groups=4, head_dim=128)
    assert flops == 37_748_736


def test_latent_projections_match_a_hand_count() -> None:
    # DeepSeek-V3, one token: 2 x 187,105,280 parameters
    flops = mla_projection_flops(
        tokens=1, hidden=7168, num_heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128
    )
    assert flops == 374_210_560


def test_routed_experts_match_a_hand_count() -> None:
    # DeepSeek-V3, one token, one layer: 8 experts x 3 matrices x (7168 x 2048) x 2
    assert mlp_flops(tokens=8, hidden=7168, ffn=2048, num_matrices=3) == 704_643_072


def test_experts_and_mlps_without_a_gate_match_a_hand_count(models: dict[str, ModelSpec]) -> None:
    # 350M+PR-MoE: 12 dense layers, 12 of one routed and one residual expert each, 2 matrices of 1024 x 4096
    parts = forward_flops_by_part(
        models["pr_moe_350m"], num_seqs=1, seq_len=2048, num_mtp_layers=0, counting=FlopsCounting.MCORE
    )
    twelve = 12 * 2 * 2048 * 2 * 1024 * 4096
    assert parts[Part.DENSE_MLP] == parts[Part.ROUTED_EXPERTS] == parts[Part.SHARED_EXPERTS] == twelve
    assert parts[Part.ATTENTION] == 24 * 2 * 2048 * 4 * 1024 * 1024
    assert parts[Part.LM_HEAD] == 2 * 2048 * 1024 * 50_257


def test_router_head_projection_and_norm_match_hand_counts() -> None:
    assert router_flops(tokens=1, hidden=7168, num_experts=256) == 3_670_016
    assert lm_head_flops(tokens=1, hidden=7168, vocab_size=129_280) == 1_853_358_080
    assert mtp_projection_flops(tokens=1, hidden=7168) == 205_520_896
    assert norm_flops_as_product(tokens=3, width=512) == 3072


@pytest.mark.parametrize(
    ("window_tokens", "causal_half", "pairs"),
    [(None, False, 64), (None, True, 32), (8, True, 32), (9, True, 32), (3, True, 3 * 8 - 3), (1, True, 8)],
)
def test_core_attention_counts_the_pairs_that_are_seen(
    window_tokens: int | None, *, causal_half: bool, pairs: int
) -> None:
    flops = core_attention_flops(
        num_seqs=2,
        seq_len=8,
        num_heads=3,
        qk_dim=5,
        v_dim=4,
        window_tokens=window_tokens,
        causal_half=causal_half,
    )
    assert flops == 2 * 2 * 3 * (5 + 4) * pairs


def test_backward_costs_twice_the_forward_pass_in_every_part(deepseek_256: Recipe) -> None:
    parts = step_flops_by_part(deepseek_256, counting=FlopsCounting.MCORE_WINDOWED)
    for part in parts.values():
        assert part.dgrad_flops + part.wgrad_flops == 2 * part.forward_flops
    assert parts[CORE_ATTENTION].wgrad_flops == 0
    assert parts[Part.ROUTED_EXPERTS].wgrad_flops == parts[Part.ROUTED_EXPERTS].forward_flops


def test_a_step_is_its_tokens_times_the_flops_of_one(deepseek_256: Recipe) -> None:
    flops = step_flops(deepseek_256, counting=FlopsCounting.MCORE_WINDOWED)
    per_token = flops / deepseek_256.tokens_per_step
    assert per_token / 1e9 == pytest.approx(249.81, abs=0.005)


def test_only_conventions_that_count_mtp_change_with_it(deepseek_256: Recipe) -> None:
    trained = deepseek_256.model_copy(update={"num_mtp_layers": 1})
    for counting, rule in RULES.items():
        if not defines(counting, deepseek_256.model):
            continue
        changed = step_flops(trained, counting=counting) != step_flops(deepseek_256, counting=counting)
        assert changed == rule.mtp


def test_chunks_are_sequences_of_their_own() -> None:
    shape = {"num_heads": 40, "qk_dim": 128, "v_dim": 128, "window_tokens": None, "causal_half": True}
    chunked = core_attention_flops(num_seqs=1, seq_len=32_768, chunk_tokens=8192, **shape)
    assert chunked == core_attention_flops(num_seqs=4, seq_len=8192, **shape)
    short = core_attention_flops(num_seqs=1, seq_len=4096, chunk_tokens=8192, **shape)
    assert short == core_attention_flops(num_seqs=1, seq_len=4096, **shape)


@pytest.mark.parametrize("key", ["nemotron_3_nano_30b_a3b", "qwen3_next_80b_a3b"])
def test_the_closed_formula_of_dgxc_refuses_layers_without_attention(loader: Loader, key: str) -> None:
    with pytest.raises(BadInputError, match="has layers without attention; use another convention"):
        gflops_per_token(loader.model(key), seq_len=4096, num_mtp_layers=0, counting=FlopsCounting.DGXC)


def test_all_gradient_of_a_state_is_of_its_input(loader: Loader, make_recipe: RecipeMaker) -> None:
    recipe = make_recipe(loader.model("nemotron_h_56b"), ParallelSpec(num_gpus=8, tensor=8))
    state = step_flops_by_part(recipe, counting=FlopsCounting.MCORE)[STATE_UPDATE]
    assert (state.dgrad_flops, state.wgrad_flops) == (2 * state.forward_flops, 0)
