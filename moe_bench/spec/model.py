"""The architecture of a model, as its authors published it and as Megatron-Core can build it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moe_bench.errors import BadInputError
from moe_bench.spec.base import (
    Fraction,
    Key,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Spec,
    Text,
)


class YarnScaling(Spec):
    """YaRN's stretching of the rotary frequencies (arXiv:2309.00071)."""

    factor: PositiveFloat
    original_max_position_embeddings: PositiveInt
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale_factor: NonNegativeFloat = 1.0
    mscale_all_dim_factor: NonNegativeFloat = 0.0
    round_correction_range: bool = True
    """Whether the borders of the corrected dimensions are rounded to whole ones (`truncate` in GPT-OSS)."""


class Rope(Spec):
    """Rotary position embedding (arXiv:2104.09864)."""

    rope_theta: PositiveFloat
    rotary_fraction: Fraction = 1.0
    """Share of each head's dimensions that rotates; GLM-4.5 rotates half."""
    interleaved: bool = False
    """Whether neighbouring dimensions form the rotating pairs (DeepSeek's layout) or the two halves do."""
    scaling: YarnScaling | None = None


class SlidingWindow(Spec):
    """Layers that see only the nearest tokens, with full attention in every n-th layer."""

    window_tokens: PositiveInt
    """Tokens that a query sees, itself included."""
    full_attention_every: PositiveInt
    """Layer n (from 1) has full attention when n is a multiple of this; 2 alternates, window first."""


class GroupedQueryAttention(Spec):
    """Attention whose key and value heads are shared by groups of query heads (arXiv:2305.13245)."""

    kind: Literal["gqa"]
    num_heads: PositiveInt
    num_query_groups: PositiveInt
    head_dim: PositiveInt
    qk_norm: Literal["none", "per_head", "whole_vector"] = "none"
    """RMSNorm on queries and keys: none, over each head (Qwen3), or over all heads at once (OLMoE)."""
    qkv_bias: bool = False
    sinks: bool = False
    """A learned logit per head that joins the softmax and attends to nothing (GPT-OSS)."""
    sliding_window: SlidingWindow | None = None


class MultiLatentAttention(Spec):
    """Attention with low-rank compressed queries, keys and values, normalised latents (arXiv:2405.04434)."""

    kind: Literal["mla"]
    num_heads: PositiveInt
    q_lora_rank: PositiveInt | None
    """Width of the compressed query; null projects queries directly."""
    kv_lora_rank: PositiveInt
    qk_nope_head_dim: PositiveInt
    qk_rope_head_dim: PositiveInt
    v_head_dim: PositiveInt


Attention = Annotated[GroupedQueryAttention | MultiLatentAttention, Field(discriminator="kind")]


class Activation(Spec):
    """The activation between the projections of an MLP or expert."""

    kind: Literal["swiglu", "clamped_swiglu", "geglu", "gelu", "squared_relu"]
    """`clamped_swiglu` (GPT-OSS): x * sigmoid(1.702 x) times the linear part plus an offset, clamped. `gelu`
    and `squared_relu` (Nemotron) have no gate, so an MLP has two matrices instead of three.
    """
    clamp_limit: PositiveFloat | None = None
    linear_offset: float = 0.0

    @property
    def is_gated(self) -> bool:
        """Whether one half of the first projection multiplies the other."""
        return self.kind not in ("gelu", "squared_relu")


class Router(Spec):
    """How tokens choose experts."""

    score_function: Literal["softmax", "sigmoid"]
    renormalise: bool
    """Whether the chosen experts' probabilities are made to sum to one."""
    num_groups: PositiveInt | None = None
    groups_per_token: PositiveInt | None = None
    """Group-limited routing (arXiv:2412.19437, 2.1.2): a token's experts come from this many groups."""
    scaling_factor: PositiveFloat = 1.0
    expert_bias: bool = False
    """A bias on the choosing scores, not the weights, moved to balance the load (arXiv:2408.15664)."""
    expert_bias_update_rate: NonNegativeFloat = 0.0
    aux_loss: Literal["none", "aux_loss", "seq_aux_loss", "global_aux_loss"] = "none"
    aux_loss_coefficient: NonNegativeFloat = 0.0
    z_loss_coefficient: NonNegativeFloat = 0.0


class MixtureOfExperts(Spec):
    """The expert layers of a model."""

    num_experts: PositiveInt
    top_k: PositiveInt
    expert_ffn_hidden_size: PositiveInt
    shared_expert_ffn_hidden_size: NonNegativeInt = 0
    """Width of all shared experts together; 0 for none."""
    shared_expert_gate: bool = False
    num_leading_dense_layers: NonNegativeInt = 0
    router: Router


class PublishedSize(Spec):
    """Parameter counts as the authors state them, and how their active count comes about."""

    total_params: PositiveFloat
    active_params: PositiveFloat
    source: Text


class ModelSpec(Spec):
    """One model: everything that fixes its parameters and its arithmetic."""

    key: Key
    """Name of its folder under `recipes/`, or of its file under `recipes/reference_models/`."""
    display_name: Text
    hf_id: Text | None = None
    """Where its weights are, or those whose shape it has; null where none were released."""
    default_run: Key | None = None
    """Recipe that the bare model name stands for; null for a reference model, which has none."""
    num_layers: PositiveInt
    hidden_size: PositiveInt
    vocab_size: PositiveInt
    max_position_embeddings: PositiveInt
    dense_ffn_hidden_size: PositiveInt | None
    """Width of the dense MLP layers; null where every layer is an expert layer."""
    attention: Attention
    rope: Rope
    activation: Activation
    moe: MixtureOfExperts | None
    linear_bias: bool = False
    """Biases on the attention output, the experts and the router (GPT-OSS)."""
    norm_epsilon: PositiveFloat
    tied_embeddings: bool = False
    num_mtp_layers: NonNegativeInt = 0
    """Multi-token prediction modules of the published model (arXiv:2412.19437, 2.2)."""
    mtp_loss_factor: NonNegativeFloat = 0.1
    init_std: PositiveFloat = 0.02
    published: PublishedSize
    sources: tuple[Text, ...]

    def shortened(self, num_layers: int) -> ModelSpec:
        """The same model with its first `num_layers` layers only; `published` still counts the whole.

        Raises BadInputError where it has fewer.
        """
        if num_layers > self.num_layers:
            raise BadInputError(
                f"{self.key} has {self.num_layers} layers, {num_layers} are asked for; name "
                f"{self.num_layers} or fewer"
            )
        return self.model_copy(update={"num_layers": num_layers})

    @property
    def num_dense_layers(self) -> int:
        """Layers with a dense MLP; they come first."""
        return self.num_layers if self.moe is None else self.moe.num_leading_dense_layers

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer `layer`, counted from 0, has experts."""
        return layer >= self.num_dense_layers
