"""A recipe: everything that changes the number, as plain data that a reviewer can read in a diff."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from moe_bench.spec.base import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Spec,
    Text,
)
from moe_bench.spec.model import LayerStructure, ModelSpec
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.pipeline import Chunk, pipeline_chunks
from moe_bench.spec.system import SystemSpec

Precision = Literal[
    "fp32",
    "bf16",
    "fp8_delayed",
    "fp8_tensorwise",
    "fp8_blockwise",
    "fp8_rowwise",
    "mxfp8",
    "nvfp4",
]
"""Arithmetic of the matrix products; weights and activations outside them are BF16 (FP32 with `fp32`)."""

KernelFamily = Literal["transformer_engine", "torch_native", "quack"]
Dispatcher = Literal["allgather", "alltoall", "deepep", "hybridep", "ncclep"]
PatchName = Literal["mtp_token_count_under_cp", "expert_gather_with_step"]
"""Changes to numbers that harness/patches.py has."""
Variant = Annotated[str, Field(pattern=r"^[a-z0-9_]*$")]
"""A part of a file name."""
RoutingMode = Literal["random_logits", "round_robin", "biased", "natural", "recorded"]
RecomputeModule = Literal["core_attn", "mla_up_proj", "layernorm", "mlp", "moe", "moe_act", "shared_experts"]
GraphModule = Literal["attn", "mlp", "moe", "moe_router", "moe_preprocess"]
OffloadModule = Literal[
    "attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act",
    "fused_group_mlp",
]  # fmt: skip
StateDtype = Literal["fp32", "bf16", "fp16", "fp8"]
QuantFormat = Literal["fp8", "nvfp4", "mxfp4"]
Arithmetic = Literal["simulated", "packed", "real"]
"""How a quantised model multiplies: what is rounded and turned back to BF16; weights held in the format's
bits and unpacked for each product; or 8-bit products of what is held."""


class Difference(Spec):
    """One field in which a recipe departs from the published row it reproduces, and why."""

    field: Text
    """Column of the row, such as `sharding`; `docs/registry.md` lists them."""
    row: Text
    recipe: Text
    why: Text


class Origin(Spec):
    """The recipe that this one was computed from, and how (moe_bench/spec/family.py)."""

    recipe: Text
    scaling: Literal["weak", "strong"]
    changes: tuple[Text, ...] = ()
    """`key=value` changes that were made to that recipe before it was scaled."""
    row: Text | None = None
    """Id of the published row that that recipe copies: how long a step takes is first guessed from it."""


class LowPrecision(Spec):
    """Options of FP8 and FP4 training beyond the recipe's `precision`."""

    param_gather: bool = False
    """Keep primary weights in FP8 and gather them so (Megatron-Core's fp8_param)."""
    num_first_layers_bf16: NonNegativeInt = 0
    num_last_layers_bf16: NonNegativeInt = 0
    attention: bool = False
    """FP8 inside attention (Megatron-Core's fp8_dot_product_attention)."""
    pad_routing_map: bool = True
    """Pad tokens per expert to the alignment of the kernels in the router."""
    reuse_grad_buffer: bool = False
    """Gather MXFP8 weights through the gradient buffer (saves memory)."""


class QuantizationSpec(Spec):
    """Weights and inputs of linear layers rounded in every forward pass while the model learns, and their
    gradients handed through (nvidia-modelopt's quantisation-aware training). Throughput is not that of the
    format: products stay in the recipe's precision.
    """

    format: QuantFormat
    experts_only: bool = False
    """Routed experts alone; attention, shared experts and dense layers stay as they are."""
    num_calibration_batches: PositiveInt = 4
    """Global batches that set the scales before the first step."""


class Fusions(Spec):
    """Fused kernels of Megatron-Core, each on or off."""

    permute: bool = False
    router: bool = False
    rope: bool = False
    activation: bool = False
    residual_norm: bool = False
    masked_softmax: bool = False
    bias_dropout: bool = False
    gradient_accumulation: bool = False
    """Weight gradients added to the FP32 buffer inside the GEMM: of all linear layers with Transformer
    Engine, of the experts with torch_native."""
    cross_entropy: Literal["none", "native", "te"] = "none"


class KernelSpec(Spec):
    """Who provides the kernels, and which of them are fused."""

    family: KernelFamily
    attention: Literal["auto", "flash", "fused", "unfused"] = "auto"
    """Backend of Transformer Engine's attention; the torch-native family chooses by features (`auto`)."""
    grouped_gemm: bool = True
    """All local experts in one grouped GEMM, rather than one GEMM each in a loop."""
    op_fuser: bool = False
    """Transformer Engine's operation fuser for the experts."""
    fusions: Fusions = Fusions()

    @property
    def triton_fusions(self) -> tuple[str, ...]:
        """What our own kernels fuse: without Transformer Engine, what Megatron-Core leaves to it."""
        if self.family == "transformer_engine":
            return ()
        names = ("router", "permute", "activation", "gradient_accumulation")
        return tuple(name for name in names if getattr(self.fusions, name))

    @property
    def is_torch_native(self) -> bool:
        """Whether all but the routed experts is made of torch's own kernels."""
        return self.family != "transformer_engine"


HYBRIDEP_DOMAIN = "NUM_OF_HYBRID_EP_RANKS_PER_NVLINK_DOMAIN"
"""Key of `env` that says how many expert ranks HybridEP reaches without a network."""


class DispatchSpec(Spec):
    """How tokens travel to their experts and back."""

    dispatcher: Dispatcher
    num_sms: PositiveInt | None = None
    """Streaming multiprocessors that DeepEP or HybridEP may use; null takes the library's default."""
    router_dtype: Literal["fp32", "fp64"] | None = "fp32"
    """Type of the routing scores; null keeps the model's."""
    apply_probs_on_input: bool = False
    high_priority_stream: bool = False


class TokenDrop(Spec):
    """Capacity: an expert that gets more than its share of a rank's micro batch drops tokens."""

    capacity_factor: PositiveFloat
    eval_capacity_factor: PositiveFloat | None = None
    """The factor while a model is evaluated; null for that of training."""
    min_capacity: NonNegativeInt = 0
    """Tokens that an expert takes whatever its share; 4 by default in DeepSpeed."""
    pad_to_capacity: bool = False
    policy: Literal["probs", "position"] = "probs"
    """Who stays: those with the largest probabilities, or the first of the sequence."""

    @property
    def is_ours(self) -> bool:
        """Whether Megatron-Core's own capacity does not do this (harness/routers.py)."""
        return self.policy == "position" or self.min_capacity > 0 or self.eval_capacity_factor is not None

    def capacity(self, *, num_choices: int, num_experts: int, is_training: bool = True) -> int:
        """Tokens of one rank's micro batch that an expert takes: C = max(ceil(T k / E c), minimum).

        `num_choices` is T k (arXiv:2101.03961, 2.2; megatron-core moe_utils.py, get_capacity).
        """
        factor = self.capacity_factor
        if not is_training and self.eval_capacity_factor is not None:
            factor = self.eval_capacity_factor
        return max(math.ceil(num_choices / num_experts * factor), self.min_capacity)


class Recompute(Spec):
    """Activations that are computed again in the backward pass instead of kept."""

    granularity: Literal["none", "selective", "full"] = "none"
    modules: tuple[RecomputeModule, ...] = ()
    """Read with `selective`."""
    method: Literal["uniform", "block"] = "uniform"
    """Read with `full`."""
    num_layers: NonNegativeInt = 0
    """Layers per unit (`uniform`) or recomputed layers per chunk (`block`); read with `full`."""


class Overlap(Spec):
    """Communication that runs beside computation."""

    expert_parallel: bool = False
    """Dispatch and combine of one micro batch under the computation of another (1F1B)."""
    delayed_wgrad: bool = False
    """Weight gradients held back to fill the gaps that `expert_parallel` leaves."""
    shared_experts: bool = False
    grad_reduce: bool = False
    param_gather: bool = False
    param_gather_with_optimizer_step: bool = False
    align_param_gather: bool = False
    p2p: bool = False
    """Pipeline transfers beside computation; only the interleaved schedule can."""
    tensor_parallel: bool = False
    """Transformer Engine's user buffers."""


class CudaGraphs(Spec):
    """Parts of the step that are captured once and replayed."""

    implementation: Literal["none", "local", "transformer_engine", "full_iteration"] = "none"
    modules: tuple[GraphModule, ...] = ()
    """Empty captures whole layers."""
    num_warmup_steps: PositiveInt = 3


class Offload(Spec):
    """State or activations kept in host memory."""

    optimizer_fraction: Fraction = 0.0
    num_activation_layers: NonNegativeInt = 0
    modules: tuple[OffloadModule, ...] = ()
    paged_stash: bool = False
    """Dispatched expert activations packed into a paged buffer (Megatron-Core's moe_paged_stash)."""


class OptimizerSpec(Spec):
    """The optimizer and the types of its state."""

    name: Literal["adam", "muon", "sgd"] = "adam"
    gradient_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which gradients are accumulated and reduced."""
    main_params_dtype: Literal["fp32", "fp16"] = "fp32"
    exp_avg_dtype: StateDtype = "fp32"
    exp_avg_sq_dtype: StateDtype = "fp32"
    learning_rate: NonNegativeFloat = 1e-4
    """Constant over the run."""
    weight_decay: NonNegativeFloat = 0.1
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.95
    adam_epsilon: PositiveFloat = 1e-8
    clip_grad_norm: NonNegativeFloat = 1.0
    """Gradient norm above which gradients are scaled down; 0 does not clip."""

    @property
    def is_precision_aware(self) -> bool:
        """Whether Megatron-Core's precision-aware optimizer is needed: some state is not FP32."""
        return {self.main_params_dtype, self.exp_avg_dtype, self.exp_avg_sq_dtype} != {"fp32"}


class Routing(Spec):
    """Where tokens go during the measurement; a throughput number means nothing without it."""

    mode: RoutingMode
    """`random_logits` (Megatron-Core's force_load_balancing): balanced on average only. `round_robin`:
    exactly balanced. `biased`: skewed by a fixed random bias per expert. `natural`: the router's choice.
    `recorded`: dealt in the proportions of `trace`, the same by every rank."""
    bias_std: NonNegativeFloat = 0.0
    """Standard deviation of the bias on the logits; read with `biased`."""
    trace: tuple[tuple[NonNegativeInt, ...], ...] = ()
    """Tokens per expert of each expert layer, those of MTP last; read with `recorded`, begun again where
    there are more layers."""


class Steps(Spec):
    """How long a run is."""

    num_warmup: PositiveInt = 10
    num_timed: PositiveInt = 40


class Recipe(Spec):
    """One run on one system. Its name is computed from its content, so a name cannot lie."""

    model: ModelSpec
    system: SystemSpec
    precision: Precision
    variant: Variant = ""
    """Suffix that tells apart recipes of the same model, system, size and precision."""
    reproduces: Text | None = None
    """Id of the published row that this recipe copies."""
    differences: tuple[Difference, ...] = ()
    origin: Origin | None = None
    """Set in recipes that were computed from another one; null where people wrote it."""
    seq_len: PositiveInt
    global_batch_size: PositiveInt
    """Sequences per optimizer step."""
    micro_batch_size: PositiveInt
    num_mtp_layers: NonNegativeInt
    """Multi-token prediction modules that are trained; 0 leaves the model's out."""
    parallel: ParallelSpec
    low_precision: LowPrecision | None = None
    quantization: QuantizationSpec | None = None
    """Null trains without; docs/quantize.md says which verbs take it."""
    kernels: KernelSpec
    dispatch: DispatchSpec
    token_drop: TokenDrop | None = None
    routing: Routing
    recompute: Recompute = Recompute()
    overlap: Overlap = Overlap()
    cuda_graphs: CudaGraphs = CudaGraphs()
    offload: Offload = Offload()
    optimizer: OptimizerSpec = OptimizerSpec()
    steps: Steps = Steps()
    seed: NonNegativeInt = 1234
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the training processes."""
    container: Text | None = None
    """Image of `containers/`, null for the bare environment."""
    patches: tuple[PatchName, ...] = ()
    """Changes to Megatron-Core's numbers that this recipe asks for by name (docs/patches.md)."""
    mcore: dict[str, bool | int | float | str | None] = Field(default_factory=dict)
    """Megatron-Core fields that the schema has no name for."""

    @property
    def run_name(self) -> str:
        """File name without suffix: `<system>_<gpus>g_<precision>[_<variant>]`."""
        parts = (self.system.key, f"{self.parallel.num_gpus}g", self.precision, self.variant)
        return "_".join(part for part in parts if part)

    @property
    def name(self) -> str:
        """`<model>/<run name>`, the only place under `recipes/` where this recipe may stand."""
        return f"{self.model.key}/{self.run_name}"

    @property
    def num_micro_batches(self) -> int:
        """Micro batches that each data-parallel rank runs per step."""
        return self.global_batch_size // (self.micro_batch_size * self.parallel.data)

    def at(self, structure: LayerStructure) -> Recipe:
        """The recipe as if every layer had the experts of this one; itself where all have the same."""
        model = self.model.at(structure)
        return self if model is self.model else self.model_copy(update={"model": model})

    def chunks(self) -> tuple[Chunk, ...]:
        """Model chunks in the order in which a token passes them.

        Raises LayoutError where the layers cannot be split so.
        """
        return pipeline_chunks(
            self.parallel, num_layers=self.model.num_layers, num_mtp_layers=self.num_mtp_layers
        )

    def layers_of(self, pipeline_rank: int) -> tuple[LayerStructure, ...]:
        """The layers that a pipeline rank builds, those of its prediction modules last.

        Raises LayoutError where the layers cannot be split so.
        """
        chunks = [chunk for chunk in self.chunks() if chunk.pipeline_rank == pipeline_rank]
        model = self.model
        decoder = [model.layer(layer) for chunk in chunks for layer in chunk.layers]
        num_modules = sum(model.num_mtp_modules(chunk.num_mtp_layers) for chunk in chunks)
        return (*decoder, *model.mtp_layers * num_modules)

    @property
    def routing_is_causal(self) -> bool:
        """Whether no token's experts depend on tokens behind it; False where their loss is not causal.

        A capacity that keeps the largest probabilities lets a later token push an earlier one out.
        """
        drop, moe = self.token_drop, self.model.moe
        drops_by_score = drop is not None and drop.policy == "probs"
        return moe is None or (moe.router.is_causal and not drops_by_score)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over the whole job."""
        return self.global_batch_size * self.seq_len
