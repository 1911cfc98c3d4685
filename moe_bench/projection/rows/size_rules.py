"""Rules for sizes that a published row leaves open: batches, parallel sizes, and where layers stand."""

from __future__ import annotations

from moe_bench.projection.rows.case import Case, Rule, always, constant
from moe_bench.projection.rows.layout import balanced_layout, even_split
from moe_bench.projection.rows.stack import Engine, Suite

_TORCHTITAN_LLAMA_SEQ_LEN = 8192
_TORCHTITAN_LOCAL_BATCHES = {"deepseek_v3_16b": 4, "llama3_8b": 1}
"""`local_batch_size` of torchtitan's training files, for models whose rows print none."""


def _shards_fill_the_job(case: Case) -> bool:
    shards_all = case.row.num_shards is not None and case.row.num_shards == case.row.num_gpus
    return case.row.sharding in ("fsdp", "fsdp2") and shards_all


def _ranks_per_batch(case: Case) -> int:
    sizes = ("parallel.tensor", "parallel.pipeline", "parallel.context")
    product = 1
    for size in sizes:
        product *= case.number(size)
    return case.number("parallel.num_gpus") // product


def _is_torchtitan(case: Case) -> bool:
    return case.stack.engine is Engine.TORCHTITAN and "global_batch_size" in case.draft


def _is_folding_mcore(case: Case) -> bool:
    """A layout of the paper that couples the experts' tensor size to that of attention."""
    return case.stack.suite is Suite.FOLDING and case.row.method in ("FSDP", "TP+EP+DP", "MCore")


def _needs_a_layout(case: Case) -> bool:
    return _split(case) is None


def _split(case: Case) -> object:
    return even_split(
        case.model.num_layers,
        case.number("num_mtp_layers"),
        case.number("parallel.pipeline"),
        case.number("parallel.virtual_pipeline"),
    )


def _layout(case: Case) -> object:
    stages = case.number("parallel.pipeline") * case.number("parallel.virtual_pipeline")
    return {"layout": balanced_layout(case.model.num_layers, case.number("num_mtp_layers"), stages)}


def _nemo_deepseek_ends(case: Case) -> object:
    middle = 64 // case.number("parallel.pipeline")
    return {"num_layers_first_stage": middle - 1, "num_layers_last_stage": middle - 2}


GRID_RULES: tuple[Rule, ...] = (
    Rule(
        name="FSDP over the whole job",
        field="parallel.tensor",
        when="FSDP shards are as many as GPUs",
        then="1",
        evidence="a shard per GPU leaves no rank for tensor parallelism",
        applies=_shards_fill_the_job,
        value=constant(1),
    ),
    Rule(
        name="FSDP over the whole job",
        field="parallel.pipeline",
        when="FSDP shards are as many as GPUs",
        then="1",
        evidence="a shard per GPU leaves no rank for a pipeline",
        applies=_shards_fill_the_job,
        value=constant(1),
    ),
    Rule(
        name="no context parallelism",
        field="parallel.context",
        when="CP is not printed",
        then="1",
        evidence="sources print a size that is not 1; docs/registry.md",
        applies=always,
        value=constant(1),
    ),
    Rule(
        name="a dense model has no expert ranks",
        field="parallel.expert",
        when="the model has no experts",
        then="1",
        evidence="Megatron-Core transformer_config.py refuses anything else",
        applies=lambda case: not case.is_moe,
        value=constant(1),
    ),
    Rule(
        name="sequence length of torchtitan's Llama files",
        field="seq_len",
        when="torchtitan, Llama 3",
        then="8192",
        evidence="pytorch/torchtitan train_configs/llama3_8b.toml, llama3_70b.toml, llama3_405b.toml",
        applies=lambda case: case.stack.engine is Engine.TORCHTITAN and case.is_model("llama3"),
        value=constant(_TORCHTITAN_LLAMA_SEQ_LEN),
    ),
)

BATCH_RULES: tuple[Rule, ...] = (
    Rule(
        name="one local batch per step",
        field="global_batch_size",
        when="torchtitan with a printed local batch",
        then="local batch x DP",
        evidence="torchtitan trains one local batch per step unless a global batch is configured",
        applies=lambda case: case.stack.engine is Engine.TORCHTITAN and case.row.local_batch is not None,
        value=lambda case: (case.row.local_batch or 1) * _ranks_per_batch(case),
    ),
    Rule(
        name="local batch of torchtitan's files",
        field="global_batch_size",
        when="torchtitan, DeepSeek-V3-16B and Llama3-8B, PP1",
        then="4 and 1 x DP",
        evidence="local_batch_size in torchtitan's train_configs/deepseek_v3_16b.toml and llama3_8b.toml; a "
        "step of 2.018 s, which a row of the former remarks, is 4 sequences per GPU",
        applies=lambda case: (
            case.stack.engine is Engine.TORCHTITAN
            and case.model.key in _TORCHTITAN_LOCAL_BATCHES
            and case.number("parallel.pipeline") == 1
        ),
        value=lambda case: _TORCHTITAN_LOCAL_BATCHES[case.model.key] * _ranks_per_batch(case),
    ),
    Rule(
        name="as many micro batches as stages in torchtitan's first pipelines",
        field="micro_batch_size",
        when="torchtitan before 2025-04 with a printed local batch, PP > 1",
        then="local batch / PP",
        evidence="pytorch/torchtitan 9dec370 parallelisms/pipelining_utils.py: n_microbatches is "
        "pipeline_parallel_degree unless given; #1073 of 2025-04 brought micro batches of one",
        applies=lambda case: (
            _is_torchtitan(case)
            and case.stack.is_before(2025, 4)
            and case.row.local_batch is not None
            and case.number("parallel.pipeline") > 1
        ),
        value=lambda case: (case.row.local_batch or 1) // case.number("parallel.pipeline"),
    ),
    Rule(
        name="micro batches of one in torchtitan's pipelines",
        field="micro_batch_size",
        when="torchtitan, PP > 1",
        then="1",
        evidence="torchtitan job_config.py, pipeline_parallel_microbatch_size: 1",
        applies=lambda case: _is_torchtitan(case) and case.number("parallel.pipeline") > 1,
        value=constant(1),
    ),
    Rule(
        name="a local batch is one micro batch",
        field="micro_batch_size",
        when="torchtitan, PP1",
        then="batch / DP",
        evidence="without a pipeline torchtitan does not cut the local batch; no row accumulates gradients",
        applies=_is_torchtitan,
        value=lambda case: case.number("global_batch_size") // _ranks_per_batch(case),
    ),
    Rule(
        name="micro batch of Folding's FSDP with expert parallelism",
        field="micro_batch_size",
        when="Parallel Folding, Mixtral-8x22B-G8T8, method FSDP+EP",
        then="2",
        evidence="with micro batches of one, gathering and reducing the experts' weights at the full rate of "
        "the network card takes longer than the published step (arXiv:2504.14960, table 3)",
        applies=lambda case: case.model.key == "mixtral_8x22b_g8t8" and case.row.method == "FSDP+EP",
        value=constant(2),
    ),
    Rule(
        name="micro batch of one",
        field="micro_batch_size",
        when="Megatron-Core, micro batch not printed",
        then="1",
        evidence="three rows of Megatron-Core in four that print it have 1, and so have ModelZoo's scripts "
        "for the sizes of Parallel Folding",
        applies=lambda case: case.stack.engine is Engine.MEGATRON,
        value=constant(1),
    ),
)

STAGE_RULES: tuple[Rule, ...] = (
    Rule(
        name="virtual stages of Parallel Folding",
        field="parallel.virtual_pipeline",
        when="Parallel Folding, PP > 1",
        then="7",
        evidence="ModelZoo's Mixtral-8x22B script has TP2 PP8 VPP7 for the same sizes",
        applies=lambda case: case.stack.suite is Suite.FOLDING,
        value=constant(7),
    ),
    Rule(
        name="virtual stages of torchtitan",
        field="parallel.virtual_pipeline",
        when="torchtitan, interleaved schedule",
        then="2",
        evidence="torchtitan pipeline_parallel.py: two stages per rank unless layers per stage are given",
        applies=lambda case: (
            case.stack.engine is Engine.TORCHTITAN and case.row.pipeline_schedule == "interleaved1f1b"
        ),
        value=constant(2),
    ),
    Rule(
        name="no virtual stages",
        field="parallel.virtual_pipeline",
        when="not printed",
        then="1",
        evidence="sources print a size that is not 1; docs/registry.md",
        applies=always,
        value=constant(1),
    ),
    Rule(
        name="MTP is not trained",
        field="num_mtp_layers",
        when="not printed",
        then="0",
        evidence="TFLOPs over tokens/s show whether a source counts MTP, and the registry records it",
        applies=always,
        value=constant(0),
    ),
    Rule(
        name="expert tensor size of Megatron-Core without folding",
        field="parallel.expert_tensor",
        when="Parallel Folding, methods FSDP, TP+EP+DP and MCore",
        then="TP",
        evidence="arXiv:2504.14960, section 2: without folding experts share the tensor group of attention",
        applies=_is_folding_mcore,
        value=lambda case: case.number("parallel.tensor"),
    ),
    Rule(
        name="expert tensor size of early Megatron-Core",
        field="parallel.expert_tensor",
        when="NeMo up to 25.04, MoE",
        then="TP",
        evidence="Megatron-Core parallel_state.py: an unset expert tensor size is that of attention; "
        "NVIDIA/dgxc-benchmarking v24.11.1 and v25.04.02 grok1_314b.yaml set none",
        applies=lambda case: case.is_moe and case.stack.suite is Suite.NEMO and case.stack.is_before(2025, 5),
        value=lambda case: case.number("parallel.tensor"),
    ),
    Rule(
        name="expert tensor size of Grok-1 on GB200",
        field="parallel.expert_tensor",
        when="Grok-1 on GB200",
        then="4",
        evidence="NVIDIA/dgxc-benchmarking v25.05.05 and v25.10.02 grok1/launch.sh: ET=4",
        applies=lambda case: case.is_model("grok") and case.is_on("GB200", "GB300"),
        value=constant(4),
    ),
    Rule(
        name="experts are not cut",
        field="parallel.expert_tensor",
        when="not printed",
        then="1",
        evidence="all rows of Bridge and ModelZoo that print it have 1",
        applies=always,
        value=constant(1),
    ),
    Rule(
        name="DeepSeek-V3 stages of NeMo",
        field="parallel.layout",
        when="NeMo, DeepSeek-V3, PP > 1",
        then="64 / PP layers in the middle, one less in the first stage and two less in the last",
        evidence="NVIDIA/NeMo scripts/performance/llm/pretrain_deepseek_v3.py",
        applies=lambda case: (
            case.stack.suite is Suite.NEMO
            and case.is_model("deepseek_v3")
            and case.number("parallel.pipeline") > 1
            and case.number("parallel.virtual_pipeline") == 1
        ),
        value=_nemo_deepseek_ends,
    ),
    Rule(
        name="balanced layout",
        field="parallel.layout",
        when="layers divide into the stages neither alone nor with embedding and loss, or MTP has to stand "
        "somewhere",
        then="equal stages, the last with what is left, MTP and loss",
        evidence="gives the strings of Megatron-Bridge for DeepSeek-V3 and Kimi-K2",
        applies=_needs_a_layout,
        value=_layout,
    ),
    Rule(
        name="even stages",
        field="parallel.layout",
        when="layers divide into the stages",
        then="even, with embedding and loss counted as layers where only that divides",
        evidence="Bridge and ModelZoo count both for Qwen3-235B (94 layers) and Llama 3.1 405B (126)",
        applies=always,
        value=_split,
    ),
    Rule(
        name="no sequence parallelism in Bridge's Qwen3.8",
        field="parallel.sequence_parallel",
        when="Bridge, Qwen3.8-27B",
        then="off",
        evidence="Megatron-Bridge 067f987df03b recipes/qwen_vl/h100/qwen35_vl.py and gb200/qwen35_vl.py: "
        "sequence_parallel = False",
        applies=lambda case: case.stack.suite is Suite.BRIDGE and case.is_model("qwen3_8_27b"),
        value=constant(False),
        is_of_release=True,
    ),
    Rule(
        name="sequence parallelism with tensor parallelism",
        field="parallel.sequence_parallel",
        when="never printed",
        then="on where TP > 1",
        evidence="Bridge helpers.py: sequence_parallel = TP > 1; experts with TP need it",
        applies=always,
        value=lambda case: case.number("parallel.tensor") > 1,
    ),
    Rule(
        name="sharding of the suite",
        field="parallel.data_sharding",
        when="not printed",
        then="megatron_fsdp in Automodel and torchtitan, else distributed_optimizer",
        evidence="torch suites train with fully_shard alone; every public configuration of Bridge, NeMo, "
        "ModelZoo and Megatron-LM's CI sets the distributed optimizer",
        applies=always,
        value=lambda case: (
            "megatron_fsdp"
            if case.stack.engine in (Engine.AUTOMODEL, Engine.TORCHTITAN)
            else "distributed_optimizer"
        ),
    ),
)
