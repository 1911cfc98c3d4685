"""Floating-point operations of a training step, part by part, under the conventions in which they are
printed.

A product of an m x k and a k x n matrix is 2 m k n operations. Recomputation never counts: these are the
operations that the model needs, not those that a recipe spends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from moe_bench.analysis.params import Part
from moe_bench.errors import BadInputError
from moe_bench.spec.model import Attention, GroupedQueryAttention, ModelSpec
from moe_bench.spec.recipe import Recipe

CORE_ATTENTION = "core_attention"
"""Key of attention's score and value products, which have no parameters and so no `Part`."""

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
    """Matrices per routed expert: 3, or 2 where the gate was forgotten."""
    idealised: bool = False
    """Whether heads are taken to fill the hidden size and every layer to hold routed experts alone; the
    formula then says nothing of multi-head latent attention.
    """
    source: str


RULES: Mapping[FlopsCounting, CountingRule] = {
    FlopsCounting.MCORE: CountingRule(
        causal_half=True,
        windows=False,
        mtp=True,
        router=False,
        latent_norms=True,
        num_expert_matrices=3,
        source="megatron-core 0.19.2, megatron/training/training.py num_floating_point_operations",
    ),
    FlopsCounting.MCORE_WINDOWED: CountingRule(
        causal_half=True,
        windows=True,
        mtp=True,
        router=False,
        latent_norms=True,
        num_expert_matrices=3,
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


def gqa_projection_flops(
    *, tokens: int, hidden: int, num_heads: int, num_query_groups: int, head_dim: int
) -> int:
    """Forward FLOPs of the query, key, value and output projections of grouped-query attention.

    F = 2 T H d (2 n + 2 g): arXiv:2305.13245. Norms, biases and rotary embedding are left out.
    """
    return 2 * tokens * hidden * head_dim * (2 * num_heads + 2 * num_query_groups)


def mla_projection_flops(
    *,
    tokens: int,
    hidden: int,
    num_heads: int,
    q_rank: int | None,
    kv_rank: int,
    nope_dim: int,
    rope_dim: int,
    v_dim: int,
) -> int:
    """Forward FLOPs of the down-, up- and output projections of multi-head latent attention.

    F = 2 T [H r_q + r_q n (d_n + d_r) + H (r_kv + d_r) + r_kv n (d_n + d_v) + n d_v H], and H n (d_n + d_r)
    for the queries where they are not compressed: arXiv:2405.04434, 2.1. Norms and biases are left out.
    """
    query = num_heads * (nope_dim + rope_dim)
    per_token = hidden * query if q_rank is None else q_rank * (hidden + query)
    per_token += hidden * (kv_rank + rope_dim) + kv_rank * num_heads * (nope_dim + v_dim)
    return 2 * tokens * (per_token + num_heads * v_dim * hidden)


def core_attention_flops(
    *,
    num_seqs: int,
    seq_len: int,
    num_heads: int,
    qk_dim: int,
    v_dim: int,
    window_tokens: int | None,
    causal_half: bool,
) -> int:
    """Forward FLOPs of the scores and of their product with the values.

    F = 2 B n (d_qk + d_v) x pairs, pairs = S^2 / 2 with `causal_half`, else S^2 (Megatron-Core counts the
    half without its diagonal); in a window of W < S tokens pairs = S W - W (W - 1) / 2, each query's nearest
    W keys (Megatron-Bridge flop_utils.py). The softmax, its scaling and sinks are left out.
    """
    twice_pairs = seq_len**2 if causal_half else 2 * seq_len**2
    if window_tokens is not None and window_tokens < seq_len:
        twice_pairs = 2 * seq_len * window_tokens - window_tokens * (window_tokens - 1)
    return num_seqs * num_heads * (qk_dim + v_dim) * twice_pairs


def gated_mlp_flops(*, tokens: int, hidden: int, ffn: int, num_matrices: int) -> int:
    """Forward FLOPs of a gated MLP or expert: F = 2 T H F x 3 (gate, up and down, arXiv:2002.05202).

    `num_matrices` is 3; the convention that forgot the gate of GPT-OSS passes 2. Activation is left out.
    """
    return 2 * tokens * hidden * ffn * num_matrices


def router_flops(*, tokens: int, hidden: int, num_experts: int) -> int:
    """Forward FLOPs of the routing scores: F = 2 T H E. Top-k and softmax are left out."""
    return 2 * tokens * hidden * num_experts


def mtp_projection_flops(*, tokens: int, hidden: int) -> int:
    """Forward FLOPs of an MTP module's projection of two concatenated vectors: F = 4 T H^2
    (arXiv:2412.19437).
    """
    return 4 * tokens * hidden**2


def lm_head_flops(*, tokens: int, hidden: int, vocab_size: int) -> int:
    """Forward FLOPs of the logits: F = 2 T H V. The loss and padding of the vocabulary are left out."""
    return 2 * tokens * hidden * vocab_size


def norm_flops_as_product(*, tokens: int, width: int) -> int:
    """What Megatron-Core adds for a norm, as if its gain were a matrix: F = 2 T width (training.py)."""
    return 2 * tokens * width


def forward_flops_by_part(
    model: ModelSpec, *, num_seqs: int, seq_len: int, num_mtp_layers: int, counting: FlopsCounting
) -> FlopsByPart:
    """Forward FLOPs of `num_seqs` sequences over the whole model, by `Part` and for the core of attention.

    Raises BadInputError where the convention says nothing of the model's attention (`defines`).
    """
    rule = RULES[counting]
    if not defines(counting, model):
        raise BadInputError(
            f"{counting}: its formula ({rule.source}) knows grouped-query attention only, {model.key} has "
            "multi-head latent attention; use another convention"
        )
    if rule.idealised:
        model = _idealised(model)
    tokens = num_seqs * seq_len
    num_mtp = num_mtp_layers if rule.mtp else 0
    num_attention = model.num_layers + num_mtp
    last_is_moe = model.is_moe_layer(model.num_layers - 1)
    num_moe = model.num_layers - model.num_dense_layers + num_mtp * last_is_moe
    parts: dict[str, int] = {
        Part.ATTENTION: num_attention * _projections(model, tokens=tokens),
        CORE_ATTENTION: _core_attention(
            model, num_seqs=num_seqs, seq_len=seq_len, num_mtp=num_mtp, rule=rule
        ),
        Part.LM_HEAD: (1 + num_mtp)
        * lm_head_flops(tokens=tokens, hidden=model.hidden_size, vocab_size=model.vocab_size),
    }
    if num_attention > num_moe:
        parts[Part.DENSE_MLP] = (num_attention - num_moe) * gated_mlp_flops(
            tokens=tokens, hidden=model.hidden_size, ffn=model.dense_ffn_hidden_size or 0, num_matrices=3
        )
    if num_moe:
        parts |= {part: num_moe * flops for part, flops in _expert_layer(model, tokens, rule).items()}
    if num_mtp:
        parts[Part.MTP_PROJECTION] = num_mtp * mtp_projection_flops(tokens=tokens, hidden=model.hidden_size)
    if rule.latent_norms:
        width = num_attention * _latent_width(model.attention) + num_mtp * 3 * model.hidden_size
        parts[Part.NORMS] = norm_flops_as_product(tokens=tokens, width=width)
    return {part: flops for part, flops in parts.items() if flops}


def defines(counting: FlopsCounting, model: ModelSpec) -> bool:
    """Whether a convention says how to count this model."""
    return not (RULES[counting].idealised and model.attention.kind == "mla")


def _idealised(model: ModelSpec) -> ModelSpec:
    """The model as dgxc-benchmarking counts it: 12 L H^2 (1 + g / n + S / 2 H) + 18 L H F k + 6 V H a token.

    So n d = H, and each of the L layers has k routed experts of width F, no shared and no dense MLP beside.
    """
    attention, moe = model.attention, model.moe
    changes: dict[str, object] = {}
    if attention.kind == "gqa":
        head_dim = model.hidden_size // attention.num_heads
        changes["attention"] = attention.model_copy(update={"head_dim": head_dim})
    if moe is not None:
        routed_alone = {"num_leading_dense_layers": 0, "shared_expert_ffn_hidden_size": 0}
        changes["moe"] = moe.model_copy(update=routed_alone)
    return model.model_copy(update=changes)


def step_flops_by_part(recipe: Recipe, *, counting: FlopsCounting) -> Mapping[str, PassFlops]:
    """FLOPs of one optimizer step over the whole job, by part and pass.

    The gradient of a product costs two products: by the input (dgrad) and by the weight (wgrad). Attention's
    core has no weights, so both of its gradient products are dgrad.
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
            dgrad_flops=flops * (2 if part == CORE_ATTENTION else 1),
            wgrad_flops=0 if part == CORE_ATTENTION else flops,
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


def _projections(model: ModelSpec, *, tokens: int) -> int:
    attention = model.attention
    if attention.kind == "mla":
        return mla_projection_flops(
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
    )


def _core_attention(
    model: ModelSpec, *, num_seqs: int, seq_len: int, num_mtp: int, rule: CountingRule
) -> int:
    """All layers' core attention; the layer inside an MTP module has no window."""
    attention = model.attention
    num_windowed = num_windowed_layers(attention, num_layers=model.num_layers) if rule.windows else 0
    num_full = model.num_layers + num_mtp - num_windowed
    window = attention.sliding_window if attention.kind == "gqa" else None
    return sum(
        num_layers
        * core_attention_flops(
            num_seqs=num_seqs,
            seq_len=seq_len,
            num_heads=attention.num_heads,
            qk_dim=_qk_dim(attention),
            v_dim=attention.v_head_dim if attention.kind == "mla" else attention.head_dim,
            window_tokens=window_tokens,
            causal_half=rule.causal_half,
        )
        for num_layers, window_tokens in (
            (num_full, None),
            (num_windowed, window.window_tokens if window else None),
        )
    )


def num_windowed_layers(attention: Attention, *, num_layers: int) -> int:
    """Decoder layers that see only a window: all but every n-th (layer n counted from 1)."""
    if not isinstance(attention, GroupedQueryAttention) or attention.sliding_window is None:
        return 0
    return num_layers - num_layers // attention.sliding_window.full_attention_every


def _qk_dim(attention: Attention) -> int:
    if attention.kind == "mla":
        return attention.qk_nope_head_dim + attention.qk_rope_head_dim
    return attention.head_dim


def _latent_width(attention: Attention) -> int:
    return (attention.q_lora_rank or 0) + attention.kv_lora_rank if attention.kind == "mla" else 0


def _expert_layer(model: ModelSpec, tokens: int, rule: CountingRule) -> FlopsByPart:
    moe = model.moe
    if moe is None:
        return {}
    hidden = model.hidden_size
    routed = gated_mlp_flops(
        tokens=tokens * moe.top_k,
        hidden=hidden,
        ffn=moe.expert_ffn_hidden_size,
        num_matrices=rule.num_expert_matrices,
    )
    shared = gated_mlp_flops(
        tokens=tokens, hidden=hidden, ffn=moe.shared_expert_ffn_hidden_size, num_matrices=3
    )
    router = router_flops(tokens=tokens, hidden=hidden, num_experts=moe.num_experts) if rule.router else 0
    return {Part.ROUTED_EXPERTS: routed, Part.SHARED_EXPERTS: shared, Part.ROUTER: router}
