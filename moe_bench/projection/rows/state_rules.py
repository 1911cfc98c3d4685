"""Rules for kernels, precision and optimizer state of a published row."""

from __future__ import annotations

from moe_bench.projection.rows.case import Case, Rule, always, constant
from moe_bench.projection.rows.stack import Engine, Suite
from moe_bench.spec.recipe import CudaGraphs, Fusions, LowPrecision

_TORCH_ENGINES = (Engine.AUTOMODEL, Engine.TORCHTITAN)


def _words(case: Case) -> str:
    return case.row.other or ""


def _is_torch_native(case: Case) -> bool:
    if case.stack.engine is Engine.TORCHTITAN:
        return True
    native_experts = case.row.experts_backend in ("gmm", "torch_mm", "torchao_mxfp8")
    return case.stack.engine is Engine.AUTOMODEL and native_experts and "TE" not in _words(case)


def _is_compiled(case: Case) -> bool:
    return case.stack.engine in _TORCH_ENGINES and "compile" in _words(case)


def _has_fused_experts(case: Case) -> bool:
    return (
        case.stack.suite is Suite.BRIDGE
        and not case.stack.is_before(2026, 6)
        and case.has("precision", "mxfp8")
        and case.is_model("deepseek", "gpt_oss", "qwen3")
        and case.is_moe
        and case.row.kind == "pretrain"
    )


def _is_mixtral_of_the_zoo(case: Case) -> bool:
    return case.stack.suite in (Suite.MODEL_ZOO, Suite.FOLDING) and case.is_model("mixtral")


def _is_bridge_ultra(case: Case) -> bool:
    return (
        case.stack.suite is Suite.BRIDGE
        and not case.stack.is_before(2026, 8)
        and case.is_model("nemotron_3_ultra")
    )


def _is_bridge_qwen_vl(case: Case) -> bool:
    """A recipe of the library, not of its benchmarks: mRoPE is not fused, the loss is Megatron-Core's."""
    return case.stack.suite is Suite.BRIDGE and case.is_model("qwen3_8_27b")


def _megatron_fusions(case: Case) -> Fusions:
    is_2025 = case.stack.release is not None and not case.stack.is_before(2025, 3) and not case.is_nemo_yaml
    is_vision = _is_bridge_qwen_vl(case)
    is_native = _is_bridge_ultra(case) or _is_mixtral_of_the_zoo(case) or is_vision
    return Fusions(
        permute=is_2025 and case.row.permute_fusion is not False,
        router=is_2025,
        rope=not is_vision,
        activation=True,
        gradient_accumulation=not case.has("parallel.data_sharding", "megatron_fsdp"),
        cross_entropy="te" if is_2025 and not is_native else "native",
    )


def _keeps_bf16_moments(case: Case) -> bool:
    if case.stack.suite in (Suite.BRIDGE, Suite.NEMO):
        return case.is_model("deepseek", "moonlight", "olmoe", "glm")
    is_low = not case.has("precision", "bf16")
    return case.stack.suite in (Suite.MODEL_ZOO, Suite.MEGATRON_LM) and (is_low or case.is_model("deepseek"))


PRECISION_RULES: tuple[Rule, ...] = (
    Rule(
        name="FP8 of NeMo",
        field="precision",
        when="`FP8` alone, NeMo",
        then="fp8_delayed",
        evidence="dgxc-benchmarking v24.11.1 llama3.1 YAML: fp8_hybrid, amax history of 1024",
        applies=lambda case: case.row.precision == "FP8" and case.stack.suite is Suite.NEMO,
        value=constant("fp8_delayed"),
    ),
    Rule(
        name="FP8 of torch suites",
        field="precision",
        when="`FP8` alone, not NeMo",
        then="fp8_tensorwise",
        evidence="torchtitan's float8 converter scales whole tensors dynamically unless told to",
        applies=lambda case: case.row.precision == "FP8",
        value=constant("fp8_tensorwise"),
    ),
)

STATE_RULES: tuple[Rule, ...] = (
    Rule(
        name="last layers of Nemotron-3-Super in BF16",
        field="low_precision",
        when="Bridge, Nemotron-3-Super in NVFP4",
        then="num_last_layers_bf16 14",
        evidence="Megatron-Bridge v0.4.0 scripts/performance/configs/nemotronh/nemotron_3_llm_pretrain.py, "
        "set_nemotron_3_super_common_configs",
        applies=lambda case: (
            case.has("precision", "nvfp4")
            and case.stack.suite is Suite.BRIDGE
            and case.is_model("nemotron_3_super")
        ),
        value=constant(LowPrecision(num_last_layers_bf16=14)),
        is_of_release=True,
    ),
    Rule(
        name="Muon keeps BF16 weights",
        field="low_precision",
        when="Muon in FP8",
        then="no options",
        evidence="Kimi-K2 of Bridge v0.5.0, as recipes/kimi_k2/gb300_nvl72_256g_mxfp8.yaml has it",
        applies=lambda case: case.has("optimizer.name", "muon") and not case.has("precision", "bf16"),
        value=constant(LowPrecision()),
    ),
    Rule(
        name="MXFP8 weights are gathered in the gradient buffer",
        field="low_precision",
        when="Megatron-Core, MXFP8, Bridge 26.06 and later, MoE",
        then="param_gather, reuse_grad_buffer, attention",
        evidence="Megatron-Bridge v0.5.0 workload configurations: fp8_dot_product_attention beside the fused "
        "experts; v0.3.0 mixed_precision.py for the rest",
        applies=_has_fused_experts,
        value=constant(LowPrecision(param_gather=True, reuse_grad_buffer=True, attention=True)),
    ),
    Rule(
        name="MXFP8 weights are gathered in FP8",
        field="low_precision",
        when="Megatron-Core, MXFP8",
        then="param_gather, reuse_grad_buffer",
        evidence="Megatron-Bridge v0.3.0 training/mixed_precision.py, bf16_with_mxfp8_mixed",
        applies=lambda case: case.has("precision", "mxfp8") and case.stack.engine is Engine.MEGATRON,
        value=constant(LowPrecision(param_gather=True, reuse_grad_buffer=True)),
    ),
    Rule(
        name="FP8 weights are gathered in FP8",
        field="low_precision",
        when="Megatron-Core, FP8 with scales per tensor, but for the YAML files of NeMo 24",
        then="param_gather",
        evidence="Megatron-Bridge v0.3.0 training/mixed_precision.py; dgxc v24.11.1 YAML: fp8_params false",
        applies=lambda case: (
            case.has("precision", "fp8_tensorwise", "fp8_delayed")
            and case.stack.engine is Engine.MEGATRON
            and not case.is_nemo_yaml
        ),
        value=constant(LowPrecision(param_gather=True)),
    ),
    Rule(
        name="block-wise FP8 weights are gathered in FP8",
        field="low_precision",
        when="ModelZoo and Megatron-LM, FP8 with scales per block",
        then="param_gather",
        evidence="ModelZoo's scripts and Megatron-LM's CI: --fp8-param-gather",
        applies=lambda case: (
            case.has("precision", "fp8_blockwise")
            and case.stack.suite in (Suite.MODEL_ZOO, Suite.MEGATRON_LM)
        ),
        value=constant(LowPrecision(param_gather=True)),
    ),
    Rule(
        name="low precision with BF16 weights",
        field="low_precision",
        when="FP8 and FP4 otherwise",
        then="no options",
        evidence="bf16_with_nvfp4_mixed and bf16_with_fp8_subchannel_scaling_mixed gather BF16",
        applies=lambda case: not case.has("precision", "bf16", "fp32"),
        value=constant(LowPrecision()),
    ),
    Rule(
        name="no low precision",
        field="low_precision",
        when="BF16",
        then="none",
        evidence="nothing to set",
        applies=always,
        value=constant(None),
    ),
    Rule(
        name="torch-native kernels",
        field="kernels.family",
        when="torchtitan; Automodel with experts of torch and no word of TE",
        then="torch_native",
        evidence="torchtitan has no Transformer Engine; the rows' experts backend",
        applies=_is_torch_native,
        value=constant("torch_native"),
    ),
    Rule(
        name="Transformer Engine",
        field="kernels.family",
        when="not printed",
        then="transformer_engine",
        evidence="the only family of NVIDIA's suites",
        applies=always,
        value=constant("transformer_engine"),
    ),
    Rule(
        name="experts one by one in NeMo 24",
        field="kernels.grouped_gemm",
        when="dgxc up to 25.04, MoE",
        then="off",
        evidence="dgxc-benchmarking v24.11.1 and v25.04.02 grok1_314b.yaml: moe_grouped_gemm false",
        applies=lambda case: case.is_nemo_yaml and case.is_moe,
        value=constant(False),
    ),
    Rule(
        name="grouped experts",
        field="kernels.grouped_gemm",
        when="never printed",
        then="on",
        evidence="every public configuration from 2025 on",
        applies=always,
        value=constant(True),
    ),
    Rule(
        name="fused expert MLP of Bridge",
        field="kernels.op_fuser",
        when="Bridge 26.06 and later, DeepSeek, Qwen3 and GPT-OSS in MXFP8; Nemotron-3-Ultra",
        then="on",
        evidence="Megatron-Bridge v0.5.0 workload configurations: cutedsl_fused_grouped_mlp; v0.6.0 "
        "perf_recipes: use_transformer_engine_op_fuser",
        applies=lambda case: _has_fused_experts(case) or _is_bridge_ultra(case),
        value=constant(True),
    ),
    Rule(
        name="fused expert MLP of full-iteration graphs",
        field="kernels.op_fuser",
        when="Megatron-LM, MXFP8, MoE, one CUDA graph per iteration",
        then="on",
        evidence="Megatron-Core gives a rank a budget of tokens with the operation fuser alone "
        "(transformer_config.py), and the graph needs the budget",
        applies=lambda case: (
            case.stack.suite is Suite.MEGATRON_LM
            and case.has("precision", "mxfp8")
            and case.is_moe
            and case.draft["cuda_graphs"] == CudaGraphs(implementation="full_iteration")
        ),
        value=constant(True),
    ),
    Rule(
        name="no operation fuser",
        field="kernels.op_fuser",
        when="never printed",
        then="off",
        evidence="Bridge helpers.py turns it off up to v0.4.1",
        applies=always,
        value=constant(False),
    ),
    Rule(
        name="fusions of Automodel",
        field="kernels.fusions",
        when="Automodel",
        then="permute, rope, activation, TE's cross entropy; with torch.compile residual_norm",
        evidence="nemo_automodel/components/moe/megatron/moe_utils.py: Transformer Engine's permutation, "
        "compiled activations; its benchmark recipes take the loss and rope of Transformer Engine",
        applies=lambda case: case.stack.engine is Engine.AUTOMODEL,
        value=lambda case: Fusions(
            permute=True, rope=True, activation=True, residual_norm=_is_compiled(case), cross_entropy="te"
        ),
    ),
    Rule(
        name="fusions of torchtitan",
        field="kernels.fusions",
        when="torchtitan",
        then="rope, activation, residual_norm with torch.compile, else none",
        evidence="the compiler fuses element-wise chains of a block; eager torch fuses nothing",
        applies=lambda case: case.stack.engine in _TORCH_ENGINES,
        value=lambda case: (
            Fusions(rope=True, activation=True, residual_norm=True) if _is_compiled(case) else Fusions()
        ),
    ),
    Rule(
        name="fusions of Megatron-Core",
        field="kernels.fusions",
        when="Megatron-Core",
        then="rope (not Qwen3.8's), activation, gradient accumulation (not with FSDP); after NeMo 24 "
        "permute, router, TE's cross entropy (native in ModelZoo's Mixtral, Nemotron-3-Ultra and Qwen3.8)",
        evidence="Bridge scripts/performance from 25.09 on, ModelZoo's scripts, dgxc v24.11.1 YAML; "
        "Bridge 067f987df03b recipes/qwen_vl/gb200/qwen35_vl.py",
        applies=always,
        value=_megatron_fusions,
    ),
    Rule(
        name="gradients of Muon",
        field="optimizer.gradient_dtype",
        when="Muon",
        then="fp32",
        evidence="Kimi-K2 of Bridge v0.5.0, as recipes/kimi_k2/gb300_nvl72_256g_mxfp8.yaml has it",
        applies=lambda case: case.has("optimizer.name", "muon"),
        value=constant("fp32"),
    ),
    Rule(
        name="gradients in BF16",
        field="optimizer.gradient_dtype",
        when="NeMo, Bridge and Automodel",
        then="bf16",
        evidence="grad_reduce_in_fp32 False in Bridge's and NeMo's performance recipes, grad_sync_dtype bf16 "
        "in NeMo 24; Automodel trains in BF16 throughout",
        applies=lambda case: case.is_nvidia_suite or case.stack.engine is Engine.AUTOMODEL,
        value=constant("bf16"),
    ),
    Rule(
        name="gradients of Folding's FSDP",
        field="optimizer.gradient_dtype",
        when="FSDP rows of MoE Parallel Folding",
        then="bf16",
        evidence="reduced in FP32 over one NIC per GPU, expert gradients alone would take longer than the "
        "published step of its FSDP + EP row (arXiv:2504.14960, table 3)",
        applies=lambda case: (
            case.stack.suite is Suite.FOLDING and case.has("parallel.data_sharding", "megatron_fsdp")
        ),
        value=constant("bf16"),
    ),
    Rule(
        name="gradients in FP32",
        field="optimizer.gradient_dtype",
        when="other suites",
        then="fp32",
        evidence="Megatron-LM's default, which ModelZoo and CI keep; torchtitan reduces in FP32",
        applies=always,
        value=constant("fp32"),
    ),
    Rule(
        name="moments in BF16",
        field="optimizer.exp_avg_dtype",
        when="DeepSeek-V3, Moonlight and OLMoE of Bridge and NeMo; FP8 and DeepSeek of ModelZoo and "
        "Megatron-LM; Automodel",
        then="bf16",
        evidence="Bridge recipes/deepseek/deepseek_v3.py, moonlight_16b.py, olmoe_7b.py; ModelZoo's FP8 "
        "scripts; Automodel's weights and moments are BF16",
        applies=lambda case: _keeps_bf16_moments(case) or case.stack.engine is Engine.AUTOMODEL,
        value=constant("bf16"),
    ),
    Rule(
        name="moments in FP32",
        field="optimizer.exp_avg_dtype",
        when="not printed otherwise",
        then="fp32",
        evidence="the optimizer's default everywhere",
        applies=always,
        value=constant("fp32"),
    ),
    Rule(
        name="both moments alike",
        field="optimizer.exp_avg_sq_dtype",
        when="not printed",
        then="as the first moment",
        evidence="every public configuration",
        applies=always,
        value=lambda case: case.draft["optimizer.exp_avg_dtype"],
    ),
)
