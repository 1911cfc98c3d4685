"""Rules for what a step keeps and captures: CUDA graphs, recomputation and offload."""

from __future__ import annotations

from moe_bench.projection.rows.case import Case, Rule, always, constant
from moe_bench.projection.rows.run_rules import BRIDGE_25_09, drops_tokens
from moe_bench.projection.rows.stack import Engine, Suite
from moe_bench.spec.recipe import CudaGraphs, Offload, Recompute, RecomputeModule

_BRIDGE_25_11 = "Megatron-Bridge v0.2.0 scripts/performance/configs/*/workload_base_configs.py"
_DGXC_25_05 = "NVIDIA/dgxc-benchmarking v25.05.05"
_NVL72 = ("GB200", "GB300")
_SELECTIVE_SHARE = 0.36
_OFFLOADED_25_09 = {"llama3_70b": 40, "llama3_1_405b": 95}
OPERATOR_CHECKPOINTING = "torchtitan's selective checkpointing"
"""The rule that stands in for a setting which no recipe can say; torch_memory.py knows what it keeps."""
NO_RECOMPUTATION = "nothing is recomputed"
"""The rule that stands for no knowledge, which the memory of the GPU may overrule."""
_LAYER_GRAPHS = CudaGraphs(implementation="local")
_ROUTER_GRAPHS = CudaGraphs(implementation="transformer_engine", modules=("moe_router", "moe_preprocess"))
_ATTENTION_GRAPHS = CudaGraphs(
    implementation="transformer_engine", modules=("attn", "moe_router", "moe_preprocess")
)


def selective(*modules: RecomputeModule) -> Recompute:
    """Recomputation of the named modules."""
    return Recompute(granularity="selective", modules=modules)


def _has_layer_graphs_of_25_09(case: Case) -> bool:
    return case.stack.is_bridge(2025, 9) and (
        (case.is_model("qwen3_30b", "llama3_8b") and case.is_on("B200", "GB200"))
        or (case.is_model("qwen3_235b") and case.is_on("GB200"))
    )


def _is_bridge_table(case: Case) -> bool:
    """Whether the row stands in a table of Bridge's releases, whose configurations are public."""
    return case.stack.suite is Suite.BRIDGE and (case.row.source.table or "").endswith("NeMo Container")


def _torchtitan_selective(case: Case) -> Recompute:
    chunks = case.number("parallel.pipeline") * case.number("parallel.virtual_pipeline")
    num_layers = round(_SELECTIVE_SHARE * case.model.num_layers / chunks)
    return Recompute(granularity="full", method="block", num_layers=num_layers)


def _is_full_iteration(case: Case) -> bool:
    graphs = case.draft.get("cuda_graphs")
    return isinstance(graphs, CudaGraphs) and graphs.implementation == "full_iteration" and case.is_moe


MEMORY_RULES: tuple[Rule, ...] = (
    Rule(
        name="CUDA graphs of layers in Bridge 25.09",
        field="cuda_graphs",
        when="Bridge 25.09: Qwen3-30B and Llama3-8B on B200 and GB200, Qwen3-235B on GB200",
        then="local, whole layers",
        evidence=f"{BRIDGE_25_09} scripts/performance/configs/*/*.yaml: cuda_graphs",
        applies=_has_layer_graphs_of_25_09,
        value=constant(_LAYER_GRAPHS),
        is_of_release=True,
    ),
    Rule(
        name="CUDA graphs of Grok-1 on GB200",
        field="cuda_graphs",
        when="dgxc, Grok-1 on GB200",
        then="local, whole layers",
        evidence=f"{_DGXC_25_05} and v25.10.02 grok1/launch.sh: CUDA_GRAPH true",
        applies=lambda case: case.is_model("grok") and case.is_on(*_NVL72),
        value=constant(_LAYER_GRAPHS),
        is_of_release=True,
    ),
    Rule(
        name="CUDA graphs of Llama3-8B in Bridge 25.11",
        field="cuda_graphs",
        when="Bridge 25.11, Llama3-8B on Blackwell",
        then="full_iteration",
        evidence=f"{_BRIDGE_25_11}: cuda_graph_impl local, scope full_iteration",
        applies=lambda case: (
            case.stack.is_bridge(2025, 11) and case.is_model("llama3_8b") and case.is_on("B200", *_NVL72)
        ),
        value=constant(CudaGraphs(implementation="full_iteration")),
        is_of_release=True,
    ),
    Rule(
        name="CUDA graphs of attention in Bridge 25.11",
        field="cuda_graphs",
        when="Bridge 25.11, DeepSeek-V3 and GPT-OSS on GB300",
        then="transformer_engine: attn, moe_router, moe_preprocess",
        evidence=_BRIDGE_25_11,
        applies=lambda case: (
            case.stack.is_bridge(2025, 11) and case.is_model("deepseek", "gpt_oss") and case.is_on("GB300")
        ),
        value=constant(_ATTENTION_GRAPHS),
        is_of_release=True,
    ),
    Rule(
        name="CUDA graphs of the router in Bridge 25.11",
        field="cuda_graphs",
        when="Bridge 25.11, Qwen3-30B on GB300",
        then="transformer_engine: moe_router, moe_preprocess",
        evidence=_BRIDGE_25_11,
        applies=lambda case: (
            case.stack.is_bridge(2025, 11) and case.is_model("qwen3_30b") and case.is_on("GB300")
        ),
        value=constant(_ROUTER_GRAPHS),
        is_of_release=True,
    ),
    Rule(
        name="modules of Transformer Engine's CUDA graphs",
        field="cuda_graphs",
        when="graphs of Transformer Engine without a list of modules",
        then="attn, moe_router, moe_preprocess",
        evidence="what rows of the same models print; whole layers cannot be captured while tokens per "
        "expert vary",
        applies=lambda case: case.row.cuda_graph == "transformer_engine",
        value=constant(_ATTENTION_GRAPHS),
    ),
    Rule(
        name="no CUDA graphs in Bridge's configuration",
        field="cuda_graphs",
        when="Bridge tables from 25.11 on",
        then="none",
        evidence="workload configurations of Bridge v0.2.0 to v0.5.1, read at the release of the row, leave "
        "cuda_graph_impl at none where they name no graphs",
        applies=lambda case: _is_bridge_table(case) and not case.stack.is_before(2025, 11),
        value=constant(CudaGraphs()),
        is_of_release=True,
    ),
    Rule(
        name="no CUDA graphs",
        field="cuda_graphs",
        when="not printed otherwise",
        then="none",
        evidence="a first projection erred by 13.0 % on rows that do not print it, with partial graphs by "
        "13.9 % and with full ones by 21.9 %",
        applies=always,
        value=constant(CudaGraphs()),
    ),
    Rule(
        name="recomputation of DeepSeek-V3 in Bridge 25.09",
        field="recompute",
        when="Bridge 25.09, DeepSeek-V3",
        then="mla_up_proj, mlp; and moe_act on GB200",
        evidence=f"{BRIDGE_25_09} run_script.py: recompute_modules",
        applies=lambda case: case.stack.is_bridge(2025, 9) and case.is_model("deepseek"),
        value=lambda case: (
            selective("mla_up_proj", "mlp", "moe_act")
            if case.is_on("GB200")
            else selective("mla_up_proj", "mlp")
        ),
        is_of_release=True,
    ),
    Rule(
        name="recomputation of DeepSeek-V3 in Bridge 25.11",
        field="recompute",
        when="Bridge 25.11, DeepSeek-V3 on GB300",
        then="moe_act",
        evidence=_BRIDGE_25_11,
        applies=lambda case: case.stack.is_bridge(2025, 11) and case.is_model("deepseek"),
        value=constant(selective("moe_act")),
        is_of_release=True,
    ),
    Rule(
        name="recomputation of GPT-OSS in Bridge 25.11",
        field="recompute",
        when="Bridge 25.11, GPT-OSS, but not on GB300",
        then="layernorm, moe_act",
        evidence=_BRIDGE_25_11,
        applies=lambda case: (
            case.stack.is_bridge(2025, 11) and case.is_model("gpt_oss") and not case.is_on("GB300")
        ),
        value=constant(selective("layernorm", "moe_act")),
        is_of_release=True,
    ),
    Rule(
        name="recomputation of DeepSeek-V3 in dgxc",
        field="recompute",
        when="NeMo, DeepSeek-V3",
        then="mla_up_proj on H100, core_attn on GB200",
        evidence=f"{_DGXC_25_05} deepseek_v3/pretraining/launch.sh: RM",
        applies=lambda case: case.stack.suite is Suite.NEMO and case.is_model("deepseek"),
        value=lambda case: selective("core_attn") if case.is_on(*_NVL72) else selective("mla_up_proj"),
        is_of_release=True,
    ),
    Rule(
        name="recomputation in Bridge's configuration",
        field="recompute",
        when="Bridge tables that print no modules",
        then="none",
        evidence="workload configurations of Bridge, read at the release of the row, name modules or layers "
        "where anything is recomputed",
        applies=_is_bridge_table,
        value=constant(Recompute()),
        is_of_release=True,
    ),
    Rule(
        name=OPERATOR_CHECKPOINTING,
        field="recompute",
        when="torchtitan, not `full`",
        then="36 % of the layers of each chunk in full",
        evidence="torchtitan activation_checkpoint.py keeps attention and every second product: wk, wo and "
        "w3, 36 % of the products of a Llama layer, are computed again; selective is its default",
        applies=lambda case: case.stack.engine is Engine.TORCHTITAN,
        value=_torchtitan_selective,
    ),
    Rule(
        name=NO_RECOMPUTATION,
        field="recompute",
        when="not printed otherwise",
        then="none, unless the run cannot fit without (projection/rows/recompute.py)",
        evidence="NeMo and ModelZoo set no granularity where they name no modules",
        applies=always,
        value=constant(Recompute()),
    ),
    Rule(
        name="offload of layers in Bridge 25.09",
        field="offload",
        when="Bridge 25.09, Llama3-70B and Llama3.1-405B under FSDP on GB200",
        then="activations of 40 layers of Llama3-70B, of 95 of Llama3.1-405B",
        evidence=f"{BRIDGE_25_09} scripts/performance/configs/llama3/llama3_70b_llm_pretrain.yaml and "
        "llama31/llama31_405b_llm_pretrain.yaml: cpu_offloading_num_layers of fp8_cs",
        applies=lambda case: (
            case.stack.is_bridge(2025, 9)
            and case.is_on("GB200")
            and case.is_model(*_OFFLOADED_25_09)
            and case.has("parallel.data_sharding", "megatron_fsdp")
        ),
        value=lambda case: Offload(num_activation_layers=_OFFLOADED_25_09[case.model.key]),
        is_of_release=True,
    ),
    Rule(
        name="paged stash of full-iteration graphs",
        field="offload",
        when="one CUDA graph per iteration, dropless MoE",
        then="paged_stash",
        evidence="Megatron-Bridge v0.5.0 deepseek_llm_pretrain.py set_full_iter_cg_configs",
        applies=lambda case: _is_full_iteration(case) and not drops_tokens(case),
        value=constant(Offload(paged_stash=True)),
    ),
    Rule(
        name="nothing is offloaded",
        field="offload",
        when="not printed",
        then="nothing",
        evidence="every suite keeps state and activations on the GPU unless told to",
        applies=always,
        value=constant(Offload()),
    ),
    Rule(
        name="static shapes of full-iteration graphs",
        field="mcore",
        when="one CUDA graph per iteration, dropless MoE",
        then="moe_expert_rank_capacity_factor 1.5",
        evidence="Megatron-Bridge v0.5.0 set_full_iter_cg_configs: each rank receives into a buffer of fixed "
        "size, since dropless shapes vary",
        applies=lambda case: _is_full_iteration(case) and not drops_tokens(case),
        value=constant({"moe_expert_rank_capacity_factor": 1.5}),
    ),
    Rule(
        name="nothing beyond the schema",
        field="mcore",
        when="never printed",
        then="nothing",
        evidence="recipes that copy a row are the only source",
        applies=always,
        value=constant({}),
    ),
)
