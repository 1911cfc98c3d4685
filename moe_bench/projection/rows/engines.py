"""What the training engines behind published rows do differently, and which rows constants are fitted to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from moe_bench.projection.rows.inference import InferredRun
from moe_bench.projection.rows.stack import Engine, Suite
from moe_bench.projection.work.operations import Part
from moe_bench.projection.work.traits import AUTOMODEL, MEGATRON, TORCHTITAN, Traits
from moe_bench.results.published import PublishedRow

TRAITS: Mapping[Engine, Traits] = {
    Engine.MEGATRON: MEGATRON,
    Engine.AUTOMODEL: AUTOMODEL,
    Engine.TORCHTITAN: TORCHTITAN,
    Engine.OTHER: MEGATRON,
}
_TRUSTED = ("A", "B")
_TE_EXPERTS = ("te", "te_mxfp8")
"""Automodel's GroupedExpertsTE, whose GroupedLinear adds the biases (components/moe/experts.py at 77f112399);
its others add them after the product (_apply_bias), as Megatron-Core does."""
_MISBOUND_SYSTEM, _MISBOUND_RELEASE = "gb300_nvl72", (2025, 11)
"""scripts/performance/utils/executors.py at v0.2.0 binds a process to CPU SLURM_LOCALID / 4, but on GB200, so
all four of a GB300 tray to the first; mended in v0.3.0 (NVIDIA/exemplar-performance issue 38)."""
_TORCHAO_EXPERTS = "torchao_mxfp8"
"""Automodel's torch_mm_mxfp8 quantizes experts alone; Transformer Engine's autocast, around the whole forward
pass, every linear layer of its own (components/models/common/utils.py at 77f112399)."""
_EXPERT_RATES: Mapping[str, float] = MappingProxyType({"gmm": 0.98, "torch_mm": 0.88})
"""Products of Automodel's other experts in BF16 on a GB200, over Transformer Engine's: what makes a step of
Qwen3-30B 1.006 and 1.032 times as long, all else equal (26.27, 26.12 and 25.45 % in
examples/llm_benchmark/qwen/qwen3_moe_30b_te_deepep_gb200.yaml)."""
_NVFP4_KEEPS_BF16 = frozenset({Part.ATTENTION_PROJECTIONS, Part.LATENT})
"""Of Nemotron-3-Super in Megatron-Bridge, with its prediction modules: scripts/performance/configs/nemotronh/
te_quant.cfg at v0.4.0. That the mixer's output projection is in MXFP8 there is left out."""
_FUSED_LATENT_ATTENTION = (2025, 7)
"""Year and month of the first release whose cuDNN may have it."""


def traits_of(run: InferredRun) -> Traits:
    """How the engine of `run` runs a layer; an unknown one as Megatron-Core does.

    Latent attention has a fused backward pass on Blackwell from cuDNN 9.11 of mid-2025 on, and no other one
    in Transformer Engine (common/fused_attn/fused_attn.cpp: d_qk = 192, d_v = 128; issue #2285 with 9.10):
    before, it runs unfused, and dgxc-benchmarking 25.05 recomputes `core_attn` on GB200 and not on H100.
    torch's own attention has but its memory-efficient kernel for it (pytorch/torchtitan #1610), half as fast
    as FlashAttention 2 (arXiv:2307.08691, figures 4 and 5: xformers).
    """
    traits = replace(
        TRAITS[run.stack.engine],
        num_flushes=_num_flushes(run),
        fuses_expert_biases=run.stack.engine is Engine.AUTOMODEL and run.row.experts_backend in _TE_EXPERTS,
    )
    if _keeps_bf16(run):
        traits = replace(traits, bf16_parts=_NVFP4_KEEPS_BF16, quantizes_mtp=False)
    if run.recipe.system.key == "gb200_nvl72":
        traits = replace(traits, experts_fraction=_EXPERT_RATES.get(run.row.experts_backend or "", 1.0))
    if run.row.experts_backend == _TORCHAO_EXPERTS:
        traits = replace(traits, bf16_parts=frozenset({Part.ATTENTION_PROJECTIONS}))
    if run.recipe.system.key == _MISBOUND_SYSTEM and run.stack.is_bridge(*_MISBOUND_RELEASE):
        traits = replace(traits, is_bound_to_first_cpu=True)
    gpu, attention = run.recipe.system.gpu, run.recipe.model.attention
    if attention.kind == "mla" and run.stack.engine is Engine.TORCHTITAN:
        return replace(traits, attention_fraction=traits.attention_fraction / 2)
    is_blackwell = gpu is not None and gpu.architecture == "blackwell"
    if is_blackwell and attention.kind == "mla" and run.stack.is_before(*_FUSED_LATENT_ATTENTION):
        return replace(traits, fuses_attention=False)
    return traits


def is_scored(row: PublishedRow) -> bool:
    """Whether the row counts for the accuracy: training for its speed, of a trust that it can carry."""
    return row.kind == "pretrain" and row.trust in _TRUSTED


def is_fitted(run: InferredRun) -> bool:
    """Whether constants are fitted to the row: it is scored, and Megatron-Core ran it."""
    return is_scored(run.row) and run.stack.engine is Engine.MEGATRON


def _keeps_bf16(run: InferredRun) -> bool:
    is_super = run.recipe.model.key == "nemotron_3_super_120b_a12b"
    return is_super and run.stack.suite is Suite.BRIDGE and run.recipe.precision == "nvfp4"


def _num_flushes(run: InferredRun) -> int:
    """Local batches of a step, each of which torch's pipelines run to its end (torch.distributed.pipelining,
    `schedule.step`); 1 where none is printed.
    """
    recipe, local_batch = run.recipe, run.row.local_batch
    runs_torch = run.stack.engine in (Engine.AUTOMODEL, Engine.TORCHTITAN)
    if not runs_torch or local_batch is None or recipe.parallel.pipeline == 1:
        return 1
    num_per_flush = max(1, local_batch // recipe.micro_batch_size)
    num_flushes, left = divmod(recipe.num_micro_batches, num_per_flush)
    return 1 if left else max(1, num_flushes)
