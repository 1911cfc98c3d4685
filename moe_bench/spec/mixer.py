"""What mixes the tokens of a layer with one another: kinds of attention, Mamba-2 and the gated delta net."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moe_bench.spec.base import NonNegativeInt, PositiveInt, Spec


class SlidingWindow(Spec):
    """Layers that see only the nearest tokens, with full attention in every n-th layer."""

    window_tokens: PositiveInt
    """Tokens that a query sees, itself included."""
    full_attention_every: PositiveInt
    """Layer n (from 1) has full attention when n is a multiple of this; 2 alternates, window first."""


class ChunkedAttention(Spec):
    """Layers that see only their own chunk of the sequence, with full attention in every n-th layer."""

    chunk_tokens: PositiveInt
    """Tokens of a chunk; a query sees those before it in its own."""
    full_attention_every: PositiveInt
    """Layer n (from 1) has full attention when n is a multiple of this; 4 in Llama 4."""


class GroupedQueryAttention(Spec):
    """Attention whose key and value heads are shared by groups of query heads (arXiv:2305.13245)."""

    kind: Literal["gqa"]
    num_heads: PositiveInt
    num_query_groups: PositiveInt
    head_dim: PositiveInt
    qk_norm: Literal["none", "per_head", "whole_vector", "without_gain"] = "none"
    """RMSNorm on queries and keys: none, over each head (Qwen3), over all heads at once (OLMoE), or over each
    head without a learned gain (Llama 4).
    """
    qkv_bias: bool = False
    sinks: bool = False
    """A learned logit per head that joins the softmax and attends to nothing (GPT-OSS)."""
    output_gate: bool = False
    """A gate per channel, projected beside the queries, that scales what the heads give (Qwen3-Next)."""
    sliding_window: SlidingWindow | None = None
    chunked: ChunkedAttention | None = None


class SparseIndexer(Spec):
    """What chooses the keys that a query of DeepSeek-V3.2 and GLM-5 sees (arXiv:2512.02556, 2.1)."""

    num_heads: PositiveInt
    head_dim: PositiveInt
    num_chosen_keys: PositiveInt
    """Keys that a query sees."""
    num_leading_layers: NonNegativeInt = 0
    """First layers, which choose for themselves."""
    every_n_layers: PositiveInt = 1
    """Of the others every n-th chooses, and the layers behind it see what it chose; 4 in GLM-5.2."""

    def is_in_layer(self, index: int) -> bool:
        """Whether decoder layer `index`, counted from 0, chooses for itself."""
        return max(index + 1 - self.num_leading_layers, 0) % self.every_n_layers == 0


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
    sparse: SparseIndexer | None = None


Attention = Annotated[GroupedQueryAttention | MultiLatentAttention, Field(discriminator="kind")]


class Mamba2(Spec):
    """State-space layers (arXiv:2405.21060) of a hybrid model."""

    num_heads: PositiveInt
    head_dim: PositiveInt
    state_size: PositiveInt
    num_groups: PositiveInt
    """Groups of heads that share the projections into and out of the state."""
    conv_width: PositiveInt = 4

    @property
    def inner_width(self) -> int:
        """Channels of all heads together."""
        return self.num_heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """Channels that the causal convolution passes: the input and both projections of the state."""
        return self.inner_width + 2 * self.num_groups * self.state_size


class GatedDeltaNet(Spec):
    """Linear attention by the gated delta rule (arXiv:2412.06464), full attention in every n-th layer."""

    num_key_heads: PositiveInt
    key_head_dim: PositiveInt
    num_value_heads: PositiveInt
    value_head_dim: PositiveInt
    conv_width: PositiveInt = 4
    full_attention_every: PositiveInt
    """Layer n (from 1) has full attention when n is a multiple of this; 4 in Qwen3-Next."""

    @property
    def key_width(self) -> int:
        """Channels of all keys; queries have as many."""
        return self.num_key_heads * self.key_head_dim

    @property
    def value_width(self) -> int:
        """Channels of all values; the output gate has as many."""
        return self.num_value_heads * self.value_head_dim


class CompressedAttention(Spec):
    """DeepSeek-V4's attention: low-rank queries and output, one head of keys that are their own values, near
    tokens seen as they are, far ones compressed (Megatron-LM dev, experimental_attention_variant/csa.py).
    """

    q_lora_rank: PositiveInt
    output_lora_rank: PositiveInt
    output_groups: PositiveInt
    """Groups of heads whose output is projected apart to `output_lora_rank` channels."""
    window_tokens: PositiveInt
    """Nearest tokens that every layer sees as they are."""
    compression_ratios: tuple[Literal[0, 4, 128], ...]
    """Tokens per compressed key, layer by layer: 128, all of them seen; 4, of which an indexer chooses the
    best; 0 for a layer that sees its window alone, as a prediction module does.
    """
    num_index_heads: PositiveInt
    index_head_dim: PositiveInt
    index_top_k: PositiveInt
