"""Rules for how a step ran: routing, dispatch, and what runs beside computation."""

from __future__ import annotations

from moe_bench.projection.rows.case import Case, Rule, always, constant
from moe_bench.projection.rows.stack import Engine, Suite
from moe_bench.spec.recipe import TokenDrop

BRIDGE_25_09 = "Megatron-Bridge fa0315ae2"
_BRIDGE_25_11 = "Megatron-Bridge v0.2.0 scripts/performance/configs/*/workload_base_configs.py"
_NVL72 = ("GB200", "GB300")


def drops_tokens(case: Case) -> bool:
    """Whether a capacity limits the experts; to be asked behind the rules of `token_drop`."""
    return isinstance(case.draft.get("token_drop"), TokenDrop)


def _is_nemo_token_drop(case: Case) -> bool:
    return (case.is_model("grok") and case.is_nvidia_suite) or (
        case.stack.suite is Suite.NEMO and case.is_model("deepseek")
    )


def _is_later_flex(case: Case) -> bool:
    if not case.is_moe or case.stack.is_before(2025, 8) or case.stack.release is None:
        return False
    is_paper = case.row.source.paper is not None and case.stack.suite is Suite.MEGATRON_LM
    return case.is_model("deepseek", "kimi") or case.stack.engine is Engine.AUTOMODEL or is_paper


def _pipelined(case: Case) -> bool:
    return case.number("parallel.virtual_pipeline") > 1


ROUTING_RULES: tuple[Rule, ...] = (
    Rule(
        name="capacity of NeMo's performance recipes",
        field="token_drop",
        when="Grok-1 of dgxc, DeepSeek-V3 on NeMo",
        then="capacity 1.0, padded",
        evidence="NVIDIA/NeMo scripts/performance/llm/pretrain_grok1_314b.py and pretrain_deepseek_v3.py "
        "(MegatronTokenDropCallback); dgxc-benchmarking v24.11.1 grok1_314b.yaml",
        applies=_is_nemo_token_drop,
        value=constant(TokenDrop(capacity_factor=1.0, pad_to_capacity=True)),
    ),
    Rule(
        name="capacity where tokens are dropped",
        field="token_drop",
        when="tokens are dropped, the capacity is not printed",
        then="1.0, padded",
        evidence=f"{BRIDGE_25_09} training/utils/moe_token_drop.py: the defaults of apply_moe_token_drop",
        applies=lambda case: case.row.token_drop is True,
        value=constant(TokenDrop(capacity_factor=1.0, pad_to_capacity=True)),
    ),
    Rule(
        name="no token is dropped",
        field="token_drop",
        when="not printed",
        then="dropless",
        evidence="Megatron-Core, Automodel and torchtitan drop none unless told to",
        applies=always,
        value=constant(None),
    ),
    Rule(
        name="exactly balanced gate of Automodel",
        field="routing.mode",
        when="Automodel with forced balance",
        then="round_robin",
        evidence="NVIDIA-NeMo/Automodel FakeBalancedGate deals experts in turn",
        applies=lambda case: case.stack.engine is Engine.AUTOMODEL and case.row.force_load_balance is True,
        value=constant("round_robin"),
    ),
    Rule(
        name="random logits of Megatron-Core",
        field="routing.mode",
        when="forced balance elsewhere",
        then="random_logits",
        evidence="Megatron-Core moe_utils.py apply_random_logits behind moe_router_force_load_balancing",
        applies=lambda case: case.row.force_load_balance is True,
        value=constant("random_logits"),
    ),
    Rule(
        name="natural routing",
        field="routing.mode",
        when="a capacity limits the experts, or the run is a functional one",
        then="natural",
        evidence=f"{BRIDGE_25_09} run_script.py forces balance for DeepEP alone, NeMo never; functional runs "
        "train on real data",
        applies=lambda case: drops_tokens(case) or case.row.kind == "pretrain_functional",
        value=constant("natural"),
    ),
    Rule(
        name="balance is forced in benchmarks",
        field="routing.mode",
        when="a benchmark without a word on routing",
        then="random_logits",
        evidence="moe_router_force_load_balancing in Bridge's performance recipes from v0.2.0 on, ModelZoo "
        "and Automodel's benchmark recipes (fake balanced gate)",
        applies=always,
        value=constant("random_logits"),
    ),
    Rule(
        name="capacity means all-to-all",
        field="dispatch.dispatcher",
        when="a capacity limits the experts",
        then="alltoall",
        evidence="Megatron-Core transformer_config.py and apply_moe_token_drop allow no other",
        applies=drops_tokens,
        value=constant("alltoall"),
    ),
    Rule(
        name="DeepEP of Bridge 25.09",
        field="dispatch.dispatcher",
        when="Bridge 25.09, DeepSeek-V3 on H100",
        then="deepep",
        evidence=f"{BRIDGE_25_09} run_script.py: enable_deepep on h100",
        applies=lambda case: (
            case.stack.is_bridge(2025, 9) and case.is_model("deepseek") and case.is_on("H100")
        ),
        value=constant("deepep"),
        is_of_release=True,
    ),
    Rule(
        name="HybridEP of Bridge 25.11",
        field="dispatch.dispatcher",
        when="Bridge 25.11, DeepSeek-V3 and Qwen3 on GB200 and GB300",
        then="hybridep",
        evidence=f"{_BRIDGE_25_11}: moe_flex_dispatcher_backend; GPT-OSS has none",
        applies=lambda case: (
            case.stack.is_bridge(2025, 11) and case.is_model("deepseek", "qwen3") and case.is_on(*_NVL72)
        ),
        value=constant("hybridep"),
        is_of_release=True,
    ),
    Rule(
        name="flex dispatcher of later suites",
        field="dispatch.dispatcher",
        when="DeepSeek and Kimi from 25.08 on, Automodel, arXiv:2603.07685",
        then="hybridep on GB200 and GB300, else deepep",
        evidence="rows of the same suites that print it; recipe code of Bridge v0.2.0 to v0.5.0",
        applies=_is_later_flex,
        value=lambda case: "hybridep" if case.is_on(*_NVL72) else "deepep",
    ),
    Rule(
        name="all-to-all of early and other suites",
        field="dispatch.dispatcher",
        when="not printed otherwise",
        then="alltoall",
        evidence="NeMo, Parallel Folding and Bridge without a flex backend set it; a first projection erred "
        "by 17.2 % on rows that print none, with flex everywhere by 30.2 %",
        applies=always,
        value=constant("alltoall"),
    ),
)

OVERLAP_RULES: tuple[Rule, ...] = (
    Rule(
        name="multiprocessors of HybridEP in Bridge",
        field="dispatch.num_sms",
        when="Bridge, HybridEP",
        then="32",
        evidence="Megatron-Bridge v0.2.0 helpers.py set_common_perf_overrides: moe_hybridep_num_sms",
        applies=lambda case: case.stack.suite is Suite.BRIDGE and case.has("dispatch.dispatcher", "hybridep"),
        value=constant(32),
    ),
    Rule(
        name="multiprocessors of the library",
        field="dispatch.num_sms",
        when="not printed",
        then="the library's default",
        evidence="nothing sets them",
        applies=always,
        value=constant(None),
    ),
    Rule(
        name="overlap of Bridge's H100 configurations",
        field="overlap.expert_parallel",
        when="Bridge 25.09 DeepSeek-V3 and 25.11 Qwen3 on H100",
        then="on",
        evidence=f"{BRIDGE_25_09} run_script.py: A2A_1F1B on h100; {_BRIDGE_25_11}: moe_a2a_overlap",
        applies=lambda case: (
            case.is_on("H100")
            and (
                (case.stack.is_bridge(2025, 9) and case.is_model("deepseek"))
                or (case.stack.is_bridge(2025, 11) and case.is_model("qwen3"))
            )
        ),
        value=constant(True),
        is_of_release=True,
    ),
    Rule(
        name="no overlap of dispatch",
        field="overlap.expert_parallel",
        when="not printed",
        then="off",
        evidence="a first projection erred by 14.4 % on rows that do not print it, with it on by 21.8 %",
        applies=always,
        value=constant(False),
    ),
    Rule(
        name="weight gradients fill the overlap",
        field="overlap.delayed_wgrad",
        when="not printed",
        then="on where Megatron-Core overlaps dispatch in a benchmark",
        evidence="Bridge helpers.py set_moe_a2a_overlap_overrides and ModelZoo's scripts set both",
        applies=always,
        value=lambda case: (
            case.stack.engine is Engine.MEGATRON
            and case.row.kind == "pretrain"
            and case.draft["overlap.expert_parallel"] is True
        ),
    ),
    Rule(
        name="DeepSeek-V3 on H100 reduces at the end",
        field="overlap.grad_reduce",
        when="Bridge, DeepSeek-V3 on H100",
        then="off",
        evidence=f"{BRIDGE_25_09} run_script.py, v0.2.0 deepseek_llm_pretrain.py: overlap_grad_reduce",
        applies=lambda case: (
            case.stack.suite is Suite.BRIDGE and case.is_model("deepseek_v3") and case.is_on("H100")
        ),
        value=constant(False),
    ),
    Rule(
        name="gradients are reduced beside computation",
        field="overlap.grad_reduce",
        when="never printed",
        then="on",
        evidence="overlap_grad_reduce in NeMo, Bridge and ModelZoo; FSDP does nothing else",
        applies=always,
        value=constant(True),
    ),
    Rule(
        name="MXFP8 weights of DeepSeek-V3 are gathered at the end",
        field="overlap.param_gather",
        when="Bridge before 26.06, DeepSeek-V3 in MXFP8",
        then="off",
        evidence="Megatron-Bridge v0.2.0 deepseek_llm_pretrain.py: overlap_param_gather False, lest NaN",
        applies=lambda case: (
            case.stack.suite is Suite.BRIDGE
            and case.stack.is_before(2026, 6)
            and case.is_model("deepseek_v3")
            and case.has("precision", "mxfp8")
        ),
        value=constant(False),
    ),
    Rule(
        name="weights of Muon are gathered at the end",
        field="overlap.param_gather",
        when="Muon",
        then="off",
        evidence="Kimi-K2 of Bridge v0.5.0, as recipes/kimi_k2/gb300_nvl72_256g_mxfp8.yaml has it",
        applies=lambda case: case.has("optimizer.name", "muon"),
        value=constant(False),
    ),
    Rule(
        name="weights are gathered beside computation",
        field="overlap.param_gather",
        when="never printed",
        then="on where gradients are",
        evidence="overlap_param_gather in NeMo, Bridge and ModelZoo",
        applies=always,
        value=lambda case: case.draft["overlap.grad_reduce"],
    ),
    Rule(
        name="weights are gathered beside the optimizer",
        field="overlap.param_gather_with_optimizer_step",
        when="never printed",
        then="on in Bridge and NeMo 24 with virtual stages, but not for MXFP8",
        evidence="Megatron-Bridge v0.2.0 helpers.py set_user_overrides; dgxc-benchmarking v24.11.1 "
        "grok1_314b.yaml; MXFP8 gathers through the gradient buffer",
        applies=always,
        value=lambda case: (
            (case.stack.suite is Suite.BRIDGE or case.is_nemo_yaml)
            and case.draft["overlap.param_gather"] is True
            and _pipelined(case)
            and not case.has("precision", "mxfp8")
        ),
    ),
    Rule(
        name="pipeline transfers beside computation",
        field="overlap.p2p",
        when="never printed",
        then="on with virtual stages",
        evidence="overlap_p2p_comm is on in NeMo, Bridge and ModelZoo; only the interleaved schedule can",
        applies=always,
        value=_pipelined,
    ),
    Rule(
        name="user buffers of dense models",
        field="overlap.tensor_parallel",
        when="NVIDIA's dense Llama rows, TP > 1, not NVFP4",
        then="on",
        evidence="ub_tp_comm_overlap in dgxc-benchmarking v24.11.1 llama3.1; COMM_OVERLAP_CONFIG_MAP of "
        "Bridge, off for nvfp4",
        applies=lambda case: (
            case.is_nvidia_suite
            and not case.is_moe
            and case.number("parallel.tensor") > 1
            and not case.has("precision", "nvfp4")
        ),
        value=constant(True),
    ),
    Rule(
        name="no user buffers",
        field="overlap.tensor_parallel",
        when="not printed",
        then="off",
        evidence="Bridge leaves it off for its MoE recipes on H100; nothing overlaps at TP1",
        applies=always,
        value=constant(False),
    ),
)
