"""Floating-point operations of a training step, part by part, under the conventions in which they are
printed.

A product of an m x k and a k x n matrix is 2 m k n operations. Recomputation never counts: these are the
operations that the model needs, not those that a recipe spends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from moe_bench.analysis.compressed_flops import (
    compressed_core_flops,
    compressed_projection_flops,
    index_score_flops,
)
from moe_bench.analysis.params import Part
from moe_bench.analysis.projection_flops import (
    gqa_projection_flops,
    indexer_projection_flops,
    mla_projection_flops,
    mlp_flops,
    mtp_projection_flops,
)
from moe_bench.analysis.sparse_flops import indexer_score_flops, sparse_core_flops
from moe_bench.analysis.state_flops import (
    delta_net_projection_flops,
    delta_net_state_flops,
    mamba_projection_flops,
    mamba_state_flops,
)
from moe_bench.errors import BadInputError
from moe_bench.spec.mixer import Attention
from moe_bench.spec.model import LayerStructure, ModelSpec
from moe_bench.spec.recipe import Recipe

CORE_ATTENTION = "core_attention"
"""Key of attention's score and value products, which have no parameters and so no `Part`."""
STATE_UPDATE = "state_update"
"""Key of the work of Mamba-2 and gated delta nets on their states, which has no parameters either."""
WITHOUT_WEIGHTS = (CORE_ATTENTION, STATE_UPDATE)

FlopsByPart = Mapping[str, int]


class FlopsCounting(StrEnum):
    """Which operations a count includes; `RULES` says it in full. The values are those of published rows."""

    MCORE = "mcore"
    MCORE_WINDOWED = "mcore-windowed"
    MCORE_FULL_ATTENTION = "mcore-old-fullattn"
    MCORE_UNGATED_EXPERTS = "mcore-bridge-gptoss-old"
    AUTOMODEL = "automodel"
    DGXC = "dgxc"
    TORCHTITAN = "torchtitan"


@dataclass(frozen=True, slots=True, kw_only=True)
class CountingRule:
    """What sets one convention apart from the others; all leave out the input embedding and the softmax."""

    causal_half: bool
    """Whether only the half of the scores that a causal mask leaves is counted."""
    windows: bool
    """Whether a windowed layer counts the scores inside its window only."""
    mtp: bool
    router: bool
    latent_norms: bool
    """Whether norms on MLA's latents and in MTP modules count as if they were products, as Megatron-Core
    does.
    """
    num_expert_matrices: int
    """Matrices per gated routed expert: 3, or 2 where the gate was forgotten."""
    idealised: bool = False
    """Whether heads are taken to fill the hidden size and every layer to hold routed experts alone; the
    formula then says nothing of multi-head latent attention or of half layers.
    """
    hybrid_heads_fill_hidden: bool = False
    """The same of the attention layers of a model with half layers."""
    mamba_twice_hidden: bool = False
    """Whether Mamba-2 layers are taken to be twice as wide as the model, whatever they are."""
    source: str


RULES: Mapping[FlopsCounting, CountingRule] = {
    FlopsCounting.MCORE: CountingRule(
        causal_half=True,
        windows=False,
        mtp=True,
        router=False,
        latent_norms=True,
        num_expert_matrices=3,
        mamba_twice_hidden=True,
        source="megatron-core 0.19.2, megatron/training/training.py num_floating_point_operations",
    ),
    FlopsCounting.MCORE_WINDOWED: CountingRule(
        causal_half=True,
        windows=True,
        mtp=True,
        router=False,
        latent_norms=True,
        num_expert_matrices=3,
        mamba_twice_hidden=True,
        source="as mcore, windows as in NVIDIA-NeMo/Megatron-Bridge flop_utils.py calculate_swa_context",
    ),
    FlopsCounting.MCORE_FULL_ATTENTION: CountingRule(
        causal_half=False,
        windows=False,
        mtp=False,
        router=False,
        latent_norms=False,
        num_expert_matrices=3,
        source="NVIDIA/Megatron-LM before 8873b55d6a (2025-03-06)",
    ),
    FlopsCounting.MCORE_UNGATED_EXPERTS: CountingRule(
        causal_half=True,
        windows=False,
        mtp=True,
        router=False,
        latent_norms=True,
        num_expert_matrices=2,
        source="NVIDIA-NeMo/Megatron-Bridge before pull request 3947, GPT-OSS rows",
    ),
    FlopsCounting.AUTOMODEL: CountingRule(
        causal_half=True,
        windows=True,
        mtp=False,
        router=False,
        latent_norms=False,
        num_expert_matrices=3,
        hybrid_heads_fill_hidden=True,
        source="NVIDIA-NeMo/Automodel nemo_automodel/components/utils/flops_utils.py",
    ),
    FlopsCounting.DGXC: CountingRule(
        causal_half=True,
        windows=False,
        mtp=False,
        router=False,
        latent_norms=False,
        num_expert_matrices=3,
        idealised=True,
        source="NVIDIA/dgxc-benchmarking grok1/README.md and llama4/pretrain/README.md, Notes",
    ),
    FlopsCounting.TORCHTITAN: CountingRule(
        causal_half=False,
        windows=False,
        mtp=False,
        router=True,
        latent_norms=False,
        num_expert_matrices=3,
        source="pytorch/torchtitan models/utils.py, less norm gains and biases (below 0.1 %)",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PassFlops:
    """Operations of one part over a whole step, by pass."""

    forward_flops: int
    dgrad_flops: int
    wgrad_flops: int

    @property
    def total_flops(self) -> int:
        """All three passes: three times the forward pass for every part."""
        return self.forward_flops + self.dgrad_flops + self.wgrad_flops


def core_attention_flops(
    *,
    num_seqs: int,
    seq_len: int,
    num_heads: int,
    qk_dim: int,
    v_dim: int,
    window_tokens: int | None,
    causal_half: bool,
    chunk_tokens: int | None = None,
) -> int:
    """Forward FLOPs of the scores and of their product with the values.

    F = 2 B n (d_qk + d_v) x pairs, pairs = S^2 / 2 with `causal_half`, else S^2 (Megatron-Core counts the
    half without its diagonal); in a window of W < S tokens pairs = S W - W (W - 1) / 2, each query's nearest
    W keys (Megatron-Bridge flop_utils.py); in chunks of C < S tokens pairs = S C / 2, a chunk being a
    sequence of its own. The softmax, its scaling and sinks are left out.
    """
    length = seq_len if chunk_tokens is None else min(chunk_tokens, seq_len)
    twice_pairs = seq_len * length * (1 if causal_half else 2)
    if window_tokens is not None and window_tokens < seq_len:
        twice_pairs = 2 * seq_len * window_tokens - window_tokens * (window_tokens - 1)
    return num_seqs * num_heads * (qk_dim + v_dim) * twice_pairs


def router_flops(*, tokens: int, hidden: int, num_experts: int) -> int:
    """Forward FLOPs of the routing scores: F = 2 T H E. Top-k and softmax are left out."""
    return 2 * tokens * hidden * num_experts


def lm_head_flops(*, tokens: int, hidden: int, vocab_size: int) -> int:
    """Forward FLOPs of the logits: F = 2 T H V. The loss and padding of the vocabulary are left out."""
    return 2 * tokens * hidden * vocab_size


def norm_flops_as_product(*, tokens: int, width: int) -> int:
    """What Megatron-Core adds for a norm, as if its gain were a matrix: F = 2 T width (training.py)."""
    return 2 * tokens * width


def forward_flops_by_part(
    model: ModelSpec, *, num_seqs: int, seq_len: int, num_mtp_layers: int, counting: FlopsCounting
) -> FlopsByPart:
    """Forward FLOPs of `num_seqs` sequences over the whole model, by `Part` and for what has no parameters.

    Raises BadInputError where the convention says nothing of the model's structure (`defines`).
    """
    rule = RULES[counting]
    if not defines(counting, model):
        raise BadInputError(
            f"{counting}: its formula ({rule.source}) knows whole layers of grouped-query attention only, "
            f"{model.key} has {_beyond_idealised(model)}; use another convention"
        )
    model = as_counted(model, rule)
    tokens = num_seqs * seq_len
    num_mtp = num_mtp_layers if rule.mtp else 0
    parts: Counter[str] = Counter()
    for structure, number in Counter(model.layers + model.mtp_layers * num_mtp).items():
        layer = layer_flops(model, structure, num_seqs=num_seqs, seq_len=seq_len, rule=rule)
        parts.update({part: number * flops for part, flops in layer.items()})
    head = lm_head_flops(tokens=tokens, hidden=model.hidden_size, vocab_size=model.vocab_size)
    parts[Part.LM_HEAD] = (1 + num_mtp) * head
    if model.hybrid_pattern is None:  # Megatron-Core's hybrid_flops leaves out the joint of MTP and its norms
        parts[Part.MTP_PROJECTION] = num_mtp * mtp_projection_flops(tokens=tokens, hidden=model.hidden_size)
        width = (model.num_layers + num_mtp) * latent_width(model) + num_mtp * 3 * model.hidden_size
        parts[Part.NORMS] = rule.latent_norms * norm_flops_as_product(tokens=tokens, width=width)
    return {part: flops for part, flops in parts.items() if flops}


def defines(counting: FlopsCounting, model: ModelSpec) -> bool:
    """Whether a convention says how to count this model."""
    return not (RULES[counting].idealised and _beyond_idealised(model))


def _beyond_idealised(model: ModelSpec) -> str:
    """What a formula for whole layers of grouped-query attention says nothing of; empty for nothing."""
    if model.attention.kind == "mla":
        return "multi-head latent attention"
    if model.compressed_attention is not None:
        return "compressed attention"
    if model.hybrid_pattern is not None or model.gated_delta_net is not None:
        return "layers without attention"
    return ""


def as_counted(model: ModelSpec, rule: CountingRule) -> ModelSpec:
    """The model as a convention takes it to be.

    dgxc-benchmarking counts 12 L H^2 (1 + g / n + S / 2 H) + 18 L H F k + 6 V H a token: n d = H, and each of
    the L layers has k routed experts of width F, no shared and no dense MLP beside. Where dense and expert
    layers alternate (Llama 4 Maverick), F is the width of the dense ones.
    """
    attention, moe = model.attention, model.moe
    changes: dict[str, object] = {}
    fills_hidden = rule.idealised or (rule.hybrid_heads_fill_hidden and model.hybrid_pattern is not None)
    if attention.kind == "gqa" and fills_hidden:
        head_dim = model.hidden_size // attention.num_heads
        changes["attention"] = attention.model_copy(update={"head_dim": head_dim})
    if moe is not None and rule.idealised:
        alone = {"num_leading_dense_layers": 0, "every_n_layers": 1, "shared_expert_ffn_hidden_size": 0}
        if moe.every_n_layers > 1 and model.dense_ffn_hidden_size is not None:
            alone["expert_ffn_hidden_size"] = model.dense_ffn_hidden_size
        changes["moe"] = moe.model_copy(update=alone)
    return model.model_copy(update=changes)


def step_flops_by_part(recipe: Recipe, *, counting: FlopsCounting) -> Mapping[str, PassFlops]:
    """FLOPs of one optimizer step over the whole job, by part and pass.

    The gradient of a product costs two products: by the input (dgrad) and by the weight (wgrad). Attention's
    core and the states of linear attention have no weights, so all of their gradient is dgrad.
    """
    forward = forward_flops_by_part(
        recipe.model,
        num_seqs=recipe.global_batch_size,
        seq_len=recipe.seq_len,
        num_mtp_layers=recipe.num_mtp_layers,
        counting=counting,
    )
    return {
        part: PassFlops(
            forward_flops=flops,
            dgrad_flops=flops * (2 if part in WITHOUT_WEIGHTS else 1),
            wgrad_flops=0 if part in WITHOUT_WEIGHTS else flops,
        )
        for part, flops in forward.items()
    }


def step_flops(recipe: Recipe, *, counting: FlopsCounting) -> int:
    """FLOPs of one optimizer step over the whole job: three times the forward pass."""
    return sum(part.total_flops for part in step_flops_by_part(recipe, counting=counting).values())


def gflops_per_token(
    model: ModelSpec, *, seq_len: int, num_mtp_layers: int, counting: FlopsCounting
) -> float:
    """10^9 FLOPs of forward and backward per trained token of a sequence of `seq_len` tokens."""
    forward = forward_flops_by_part(
        model, num_seqs=1, seq_len=seq_len, num_mtp_layers=num_mtp_layers, counting=counting
    )
    return 3 * sum(forward.values()) / seq_len / 1e9


def layer_flops(
    model: ModelSpec, structure: LayerStructure, *, num_seqs: int, seq_len: int, rule: CountingRule
) -> dict[str, int]:
    """Forward FLOPs of one layer of a model `as_counted`, by part; norms are left out."""
    tokens, hidden = num_seqs * seq_len, model.hidden_size
    parts: dict[str, int] = {}
    if structure.mixer == "attention":
        parts[Part.ATTENTION] = _projections(model, structure, tokens=tokens)
        parts[CORE_ATTENTION] = _core_attention(
            model.attention, structure, num_seqs=num_seqs, seq_len=seq_len, rule=rule
        )
    elif structure.mixer == "compressed_attention":
        parts |= _compressed_attention(model, structure, num_seqs=num_seqs, seq_len=seq_len)
    elif structure.mixer == "mamba" and model.mamba is not None:
        mamba = model.mamba
        inner = 2 * hidden if rule.mamba_twice_hidden else mamba.inner_width
        parts[Part.MAMBA] = mamba_projection_flops(tokens=tokens, hidden=hidden, inner=inner, mamba=mamba)
        parts[STATE_UPDATE] = mamba_state_flops(tokens=tokens, inner=inner, state_size=mamba.state_size)
    elif structure.mixer == "gated_delta_net" and model.gated_delta_net is not None:
        net = model.gated_delta_net
        parts[Part.GATED_DELTA_NET] = delta_net_projection_flops(tokens=tokens, hidden=hidden, net=net)
        parts[STATE_UPDATE] = delta_net_state_flops(tokens=tokens, net=net)
    if structure.ffn == "dense":
        num_matrices = 2 + model.activation.is_gated
        ffn = model.dense_ffn_hidden_size or 0
        parts[Part.DENSE_MLP] = mlp_flops(tokens=tokens, hidden=hidden, ffn=ffn, num_matrices=num_matrices)
    elif structure.ffn == "moe":
        parts |= _expert_layer(model.at(structure), tokens, rule)
    return parts


def _projections(model: ModelSpec, structure: LayerStructure, *, tokens: int) -> int:
    attention = model.attention
    if attention.kind == "mla":
        q_rank = attention.q_lora_rank or model.hidden_size
        index = 0
        if attention.sparse is not None and structure.has_indexer:
            index = indexer_projection_flops(
                tokens=tokens, hidden=model.hidden_size, q_rank=q_rank, indexer=attention.sparse
            )
        return index + mla_projection_flops(
            tokens=tokens,
            hidden=model.hidden_size,
            num_heads=attention.num_heads,
            q_rank=attention.q_lora_rank,
            kv_rank=attention.kv_lora_rank,
            nope_dim=attention.qk_nope_head_dim,
            rope_dim=attention.qk_rope_head_dim,
            v_dim=attention.v_head_dim,
        )
    return gqa_projection_flops(
        tokens=tokens,
        hidden=model.hidden_size,
        num_heads=attention.num_heads,
        num_query_groups=attention.num_query_groups,
        head_dim=attention.head_dim,
        output_gate=attention.output_gate,
    )


def _core_attention(
    attention: Attention, structure: LayerStructure, *, num_seqs: int, seq_len: int, rule: CountingRule
) -> int:
    if attention.kind == "mla" and attention.sparse is not None:
        scores = indexer_score_flops(num_seqs=num_seqs, seq_len=seq_len, indexer=attention.sparse)
        core = sparse_core_flops(
            num_seqs=num_seqs,
            seq_len=seq_len,
            num_heads=attention.num_heads,
            kv_rank=attention.kv_lora_rank,
            rope_dim=attention.qk_rope_head_dim,
            num_chosen_keys=attention.sparse.num_chosen_keys,
        )
        return core + scores * structure.has_indexer
    return core_attention_flops(
        num_seqs=num_seqs,
        seq_len=seq_len,
        num_heads=attention.num_heads,
        qk_dim=_qk_dim(attention),
        v_dim=attention.v_head_dim if attention.kind == "mla" else attention.head_dim,
        window_tokens=structure.window_tokens if rule.windows else None,
        chunk_tokens=structure.chunk_tokens if rule.windows else None,
        causal_half=rule.causal_half,
    )


def _compressed_attention(
    model: ModelSpec, structure: LayerStructure, *, num_seqs: int, seq_len: int
) -> dict[str, int]:
    net, attention, ratio = model.compressed_attention, model.attention, structure.compression_ratio or 0
    if net is None:
        return {}
    heads = {"num_heads": attention.num_heads, "head_dim": _qk_dim(attention)}
    core = compressed_core_flops(num_seqs=num_seqs, seq_len=seq_len, net=net, ratio=ratio, **heads)
    scores = index_score_flops(num_seqs=num_seqs, seq_len=seq_len, net=net, ratio=ratio)
    projections = compressed_projection_flops(
        tokens=num_seqs * seq_len, hidden=model.hidden_size, net=net, ratio=ratio, **heads
    )
    return {Part.ATTENTION: projections, CORE_ATTENTION: core + scores}


def _qk_dim(attention: Attention) -> int:
    if attention.kind == "mla":
        return attention.qk_nope_head_dim + attention.qk_rope_head_dim
    return attention.head_dim


def latent_width(model: ModelSpec) -> int:
    """Width of the latents that are normalised in one layer: r_q + r_kv."""
    attention, compressed = model.attention, model.compressed_attention
    if attention.kind == "mla":
        return (attention.q_lora_rank or 0) + attention.kv_lora_rank
    return 0 if compressed is None else compressed.q_lora_rank + attention.head_dim


def _expert_layer(model: ModelSpec, tokens: int, rule: CountingRule) -> FlopsByPart:
    moe, hidden = model.moe, model.hidden_size
    if moe is None:
        return {}
    is_gated = model.activation.is_gated
    routed = mlp_flops(
        tokens=tokens * moe.top_k,
        hidden=model.expert_hidden_size,
        ffn=moe.expert_ffn_hidden_size,
        num_matrices=rule.num_expert_matrices if is_gated else 2,
    )
    shared = mlp_flops(
        tokens=tokens, hidden=hidden, ffn=moe.shared_expert_ffn_hidden_size, num_matrices=2 + is_gated
    )
    return {
        Part.ROUTED_EXPERTS: routed,
        Part.SHARED_EXPERTS: shared,
        Part.LATENT_PROJECTIONS: 4 * tokens * hidden * (moe.latent_size or 0),
        Part.ROUTER: router_flops(tokens=tokens, hidden=hidden, num_experts=moe.num_experts) * rule.router,
    }
