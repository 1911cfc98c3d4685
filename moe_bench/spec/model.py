"""The architecture of a model, as its authors published it and as Megatron-Core can build it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from moe_bench.errors import BadInputError
from moe_bench.spec.activation import Activation
from moe_bench.spec.base import (
    Key,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Spec,
    Text,
)
from moe_bench.spec.mixer import Attention, CompressedAttention, GatedDeltaNet, Mamba2
from moe_bench.spec.rope import Rope

HybridPattern = Annotated[str, Field(pattern=r"^[M*E-]+$")]

RouterChoice = Literal["top_k", "gshard", "sinkhorn", "expert_choice"]


class Router(Spec):
    """How tokens choose experts, or experts tokens."""

    choice: RouterChoice = "top_k"
    """`top_k`: a token takes its best experts. `gshard`: its best, and while it trains its second best with
    twice that one's share of their weights as the chance; first choices fill capacities before second ones
    (arXiv:2006.16668, algorithm 1). `sinkhorn`: its best after the scores of a rank's micro batch were
    balanced (arXiv:2103.16716; Megatron-Core's). `expert_choice`: every expert takes its best tokens of a
    rank's micro batch, T k / E of T (arXiv:2202.09368).
    """
    score_function: Literal["softmax", "sigmoid", "sqrt_softplus"]
    renormalise: bool
    """Whether the chosen experts' probabilities are made to sum to one."""
    num_groups: PositiveInt | None = None
    groups_per_token: PositiveInt | None = None
    """Group-limited routing (arXiv:2412.19437, 2.1.2): a token's experts come from this many groups."""
    scaling_factor: PositiveFloat = 1.0
    has_bias: bool = True
    """Whether `linear_bias` reaches the router's logits, as in GPT-OSS; not in DeepSpeed."""
    expert_bias: bool = False
    """A bias on the choosing scores, not the weights, moved to balance the load (arXiv:2408.15664)."""
    expert_bias_update_rate: NonNegativeFloat = 0.0
    aux_loss: Literal["none", "aux_loss", "seq_aux_loss", "global_aux_loss"] = "none"
    aux_loss_coefficient: NonNegativeFloat = 0.0
    z_loss_coefficient: NonNegativeFloat = 0.0

    @property
    def is_causal(self) -> bool:
        """Whether a token's experts depend on no later token while it trains, capacities of top-k aside.

        First choices of later tokens come before GShard's second ones.
        """
        return self.choice == "top_k"


class ExpertStep(Spec):
    """Experts of other number or width, from one layer on."""

    from_layer: PositiveInt
    """First decoder layer, counted from 0, that has them; those behind it have, too, up to the next step."""
    num_experts: PositiveInt
    expert_ffn_hidden_size: PositiveInt


class MixtureOfExperts(Spec):
    """The expert layers of a model."""

    num_experts: PositiveInt
    top_k: PositiveInt
    expert_ffn_hidden_size: PositiveInt
    shared_expert_ffn_hidden_size: NonNegativeInt = 0
    """Width of all shared experts together; 0 for none."""
    shared_expert_gate: bool = False
    shared_expert_mixing: Literal["sum", "softmax"] = "sum"
    """How routed and shared experts come together: added, or weighed for each token by a softmax of two
    learned logits (the residual experts of DeepSpeed, deepspeed/moe/layer.py, `coefficient`).
    """
    num_leading_dense_layers: NonNegativeInt = 0
    every_n_layers: PositiveInt = 1
    """Layer n (from 1) has experts when n is a multiple of this; 2 in Llama 4 Maverick."""
    latent_size: PositiveInt | None = None
    """Width to which tokens are projected before dispatch, and in which routed experts work (Nemotron 3
    Super); null for the hidden size. Router and shared experts see the hidden size.
    """
    steps: tuple[ExpertStep, ...] = ()
    """Where experts change on the way up, in order: a pyramid (PR-MoE, arXiv:2201.05596, 4.1)."""
    router: Router

    @property
    def expert_counts(self) -> tuple[int, ...]:
        """Experts of a layer, from the first expert layers up to the last."""
        return (self.num_experts, *(step.num_experts for step in self.steps))

    @property
    def common_num_experts(self) -> int:
        """The largest number that divides the experts of every layer."""
        return math.gcd(*self.expert_counts)

    def up_to(self, num_layers: int) -> MixtureOfExperts:
        """The experts of so many layers: without the steps that none of them reaches."""
        steps = tuple(step for step in self.steps if step.from_layer < num_layers)
        return self if len(steps) == len(self.steps) else self.model_copy(update={"steps": steps})

    def on_step(self, step: ExpertStep | None) -> MixtureOfExperts:
        """The experts of the layers on one step, with no others; None for those below the first."""
        if step is None:
            return self.model_copy(update={"steps": ()}) if self.steps else self
        sizes = {"num_experts": step.num_experts, "expert_ffn_hidden_size": step.expert_ffn_hidden_size}
        return self.model_copy(update={"steps": (), **sizes})


HuggingFaceModelType = Literal[
    "deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss", "mixtral", "olmoe", "qwen3_moe"
]


class PublishedSize(Spec):
    """Parameter counts as the authors state them, and how their active count comes about."""

    total_params: PositiveFloat
    active_params: PositiveFloat | None
    """Null where no source prints them."""
    source: Text


Mixer = Literal["attention", "compressed_attention", "mamba", "gated_delta_net"]
FeedForward = Literal["dense", "moe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStructure:
    """What one layer does to a token: mix it with others, transform it alone, or one after the other."""

    mixer: Mixer | None
    """None in the half layers of a hybrid model that only transform."""
    ffn: FeedForward | None
    """None in the half layers of a hybrid model that only mix."""
    window_tokens: int | None = None
    """Tokens that a query of this layer sees, itself included; None for all before it."""
    chunk_tokens: int | None = None
    """Length of the chunks that a query of this layer does not see out of; None for no chunks."""
    compression_ratio: int | None = None
    """Tokens per compressed key of compressed attention, 0 for none of them; None for other mixers."""
    has_indexer: bool = False
    """Whether this layer chooses the keys that its queries see."""
    step: ExpertStep | None = None
    """Its experts where they are not those of the first expert layers."""


_HYBRID_LETTERS = {
    "M": LayerStructure(mixer="mamba", ffn=None),
    "*": LayerStructure(mixer="attention", ffn=None),
    "E": LayerStructure(mixer=None, ffn="moe"),
    "-": LayerStructure(mixer=None, ffn="dense"),
}
"""Megatron-Core's symbols (models/hybrid/hybrid_layer_allocation.py) for half layers."""


class ModelSpec(Spec):
    """One model: everything that fixes its parameters and its arithmetic."""

    key: Key
    """Name of its folder under `recipes/`, or of its file under `recipes/reference_models/`."""
    display_name: Text
    hf_id: Text | None = None
    """Where its weights are, or those whose shape it has; null where none were released."""
    hf_model_type: HuggingFaceModelType | None = None
    """Class of transformers 5 that runs them; null where `moe_bench/checkpoints` has no map for it."""
    default_run: Key | None = None
    """Recipe that the bare model name stands for; null for a reference model, which has none."""
    num_layers: PositiveInt
    """Layers, or half layers where there is a hybrid pattern."""
    hybrid_pattern: HybridPattern | None = None
    """One letter per layer as Megatron-Core spells them: M Mamba-2, * attention, E experts, - dense MLP."""
    hidden_size: PositiveInt
    vocab_size: PositiveInt
    max_position_embeddings: PositiveInt
    dense_ffn_hidden_size: PositiveInt | None
    """Width of the dense MLP layers; null where every layer is an expert layer."""
    attention: Attention
    compressed_attention: CompressedAttention | None = None
    """What joins `attention`, whose heads it has, in every layer of DeepSeek-V4."""
    mamba: Mamba2 | None = None
    gated_delta_net: GatedDeltaNet | None = None
    rope: Rope
    activation: Activation
    moe: MixtureOfExperts | None
    num_residual_streams: PositiveInt = 1
    """Streams that run beside one another past every half layer, mixed before and after it (DeepSeek-V4's
    manifold-constrained hyper-connections).
    """
    linear_bias: bool = False
    """Biases on the attention output, MLPs, experts and, where `has_bias` of it says so, the router."""
    learned_positions: bool = False
    """Whether an embedding of each of `max_position_embeddings` positions is added to that of the token
    (GPT-2); `rope.rotary_fraction` is 0 then.
    """
    normalization: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """`layernorm` takes the mean away and has an offset beside each gain (arXiv:1607.06450)."""
    norm_epsilon: PositiveFloat
    tied_embeddings: bool = False
    num_mtp_layers: NonNegativeInt = 0
    """Depths of multi-token prediction that the published model was trained with (arXiv:2412.19437, 2.2)."""
    mtp_is_shared: bool = False
    """Whether one module serves every depth of prediction (Nemotron 3)."""
    mtp_pattern: HybridPattern | None = None
    """Half layers inside a prediction module of a hybrid model; null for a layer of the last layer's kind."""
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
        pattern = None if self.hybrid_pattern is None else self.hybrid_pattern[:num_layers]
        moe = None if self.moe is None else self.moe.up_to(num_layers)
        return self.model_copy(update={"num_layers": num_layers, "hybrid_pattern": pattern, "moe": moe})

    @property
    def layers(self) -> tuple[LayerStructure, ...]:
        """The structure of every decoder layer."""
        return tuple(map(self.layer, range(self.num_layers)))

    def layer(self, index: int) -> LayerStructure:
        """The structure of decoder layer `index`, counted from 0."""
        if self.hybrid_pattern is not None:
            return _HYBRID_LETTERS[self.hybrid_pattern[index]]
        window = chunk = None
        compressed = self.compressed_attention
        if self.attention.kind == "gqa":
            windowed, chunked = self.attention.sliding_window, self.attention.chunked
            if windowed is not None and (index + 1) % windowed.full_attention_every:
                window = windowed.window_tokens
            if chunked is not None and (index + 1) % chunked.full_attention_every:
                chunk = chunked.chunk_tokens
        return LayerStructure(
            mixer=self._mixer(index),
            ffn="moe" if self._has_experts(index) else "dense",
            window_tokens=window,
            chunk_tokens=chunk,
            compression_ratio=compressed.compression_ratios[index] if compressed is not None else None,
            has_indexer=self._has_indexer(index),
            step=self._step(index),
        )

    def at(self, structure: LayerStructure) -> ModelSpec:
        """The model as if every layer had the experts of this one; itself where all have the same."""
        if self.moe is None or not self.moe.steps:
            return self
        return self.model_copy(update={"moe": self.moe.on_step(structure.step)})

    @property
    def mtp_layers(self) -> tuple[LayerStructure, ...]:
        """The structure of what stands in one prediction module; its attention has no window."""
        if self.mtp_pattern is not None:
            return tuple(_HYBRID_LETTERS[letter] for letter in self.mtp_pattern)
        last = self.layer(self.num_layers - 1)
        ratio = None if self.compressed_attention is None else 0
        has_indexer = self.attention.kind == "mla" and self.attention.sparse is not None
        return (
            LayerStructure(
                mixer=last.mixer,
                ffn=last.ffn,
                compression_ratio=ratio,
                has_indexer=has_indexer,
                step=last.step,
            ),
        )

    def num_mtp_modules(self, num_depths: int) -> int:
        """Prediction modules with parameters of their own behind `num_depths` depths of prediction."""
        return min(num_depths, 1) if self.mtp_is_shared else num_depths

    @property
    def num_dense_layers(self) -> int:
        """Layers with a dense MLP."""
        if self.hybrid_pattern is not None:
            return self.hybrid_pattern.count("-")
        return self.num_layers - sum(map(self._has_experts, range(self.num_layers)))

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer `layer`, counted from 0, has experts."""
        return self._has_experts(layer)

    @property
    def router_bias(self) -> bool:
        """Whether the router adds a bias to its logits."""
        return self.linear_bias and self.moe is not None and self.moe.router.has_bias

    @property
    def num_norm_vectors(self) -> int:
        """Vectors of parameters in a norm: gains, and with LayerNorm offsets."""
        return 2 if self.normalization == "layernorm" else 1

    @property
    def expert_hidden_size(self) -> int:
        """Width of the tokens that are dispatched to routed experts."""
        return (self.moe and self.moe.latent_size) or self.hidden_size

    def _mixer(self, index: int) -> Mixer:
        if self.compressed_attention is not None:
            return "compressed_attention"
        linear = self.gated_delta_net
        is_linear = linear is not None and (index + 1) % linear.full_attention_every
        return "gated_delta_net" if is_linear else "attention"

    def _has_indexer(self, index: int) -> bool:
        if self.attention.kind != "mla" or self.attention.sparse is None:
            return False
        return self.attention.sparse.is_in_layer(index)

    def _step(self, index: int) -> ExpertStep | None:
        steps = self.moe.steps if self.moe is not None and self._has_experts(index) else ()
        reached = [step for step in steps if step.from_layer <= index]
        return reached[-1] if reached else None

    def _has_experts(self, index: int) -> bool:
        if self.hybrid_pattern is not None:
            return self.hybrid_pattern[index] == "E"
        moe = self.moe
        if moe is None or index < moe.num_leading_dense_layers:
            return False
        return (index + 1) % moe.every_n_layers == 0
