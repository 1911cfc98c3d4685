"""Megatron-Core's experts on torch's grouped GEMM, without host synchronisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_expert_parallel_rng_tracker_name,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.kernels.activation import ExpertActivation, GatedActivation, expert_activation
from moe_bench.harness.kernels.expert_checkpoint import ExpertShards, sharded_parameters
from moe_bench.harness.kernels.grouped_linear import (
    PLAIN,
    Accumulate,
    Products,
    activated_grouped_linear,
    group_offsets,
    grouped_linear,
    membership,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StackShape:
    """Sizes of one stack of expert weights on this rank, and how it is cut."""

    in_features: int
    out_features: int
    split: Literal["out", "in"]
    """Dimension that expert tensor parallelism cuts."""
    has_gate: bool = False
    """Whether the outputs are two halves, gate first, each cut by itself."""


class ExpertStack(torch.nn.Module):
    """One projection of all local experts: `weight` [experts, out, in] and perhaps `bias` [experts, out].

    Apart, each expert has parameters of its own, `weight<n>` [out, in] and `bias<n>` [out], named as in
    Transformer Engine. Megatron-FSDP wants them so: it never divides a row, and a row of the stack is an
    expert (megatron_fsdp/param_and_grad_buffer.py, chunk_size_factor), so that one expert over 16 ranks would
    be padded to 16; and its checkpoints number experts by these names (fsdp_dtensor_checkpoint.py).
    """

    def __init__(
        self,
        config: TransformerConfig,
        shape: StackShape,
        *,
        num_experts: int,
        are_apart: bool,
        init_method: Callable[[Tensor], Any],
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__()
        self.shape, self.num_experts, self.are_apart = shape, num_experts, are_apart
        self.products: Products = PLAIN
        self.accumulate: Accumulate | None = None
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        leading = () if are_apart else (num_experts,)
        sizes = {"weight": (*leading, shape.out_features, shape.in_features)}
        if config.add_bias_linear:
            sizes["bias"] = (*leading, shape.out_features)
        for kind, size in sizes.items():
            for name in self._names(kind):
                values = torch.zeros(size, dtype=config.params_dtype, device=device)
                self.register_parameter(name, torch.nn.Parameter(values))
        self._mark(config)
        if config.perform_initialization and not self.weights[0].is_meta:
            self._initialise(config, init_method, groups)

    def _names(self, kind: str) -> list[str]:
        return [f"{kind}{expert}" for expert in range(self.num_experts)] if self.are_apart else [kind]

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """One tensor [experts, out, in], or a matrix [out, in] for each expert."""
        return tuple(self.get_parameter(name) for name in self._names("weight"))

    @property
    def biases(self) -> Tensor | None:
        """[experts, out]; copied together where they are apart, as they are small."""
        names = [name for name in self._names("bias") if name in self._parameters]
        if not names:
            return None
        biases = [self.get_parameter(name) for name in names]
        return torch.stack(biases) if self.are_apart else biases[0]

    def _mark(self, config: TransformerConfig) -> None:
        """The attributes that Megatron-Core's own linear layers set, by the same rule (layers.py:961).

        `allreduce` False puts a gradient into the expert-data-parallel buffers. They differ from the dense
        ones where experts are spread (EP) and also where experts are cut otherwise than the rest (ETP other
        than TP).
        """
        uses_expert_groups = (
            config.expert_model_parallel_size > 1
            or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        out_axis = 0 if self.are_apart else 1
        for name, parameter in self.named_parameters():
            if self.shape.split == "out":
                set_tensor_model_parallel_attributes(parameter, True, out_axis, 1)
            elif name.startswith("weight"):
                set_tensor_model_parallel_attributes(parameter, True, out_axis + 1, 1)
            parameter.allreduce = not uses_expert_groups

    def _initialise(
        self, config: TransformerConfig, init_method: Callable[[Tensor], Any], groups: ProcessGroupCollection
    ) -> None:
        """Draw the weights: on a GPU from the stream of this rank's experts, on the host all experts whole.

        The host's generator is the same on every rank, so that each keeps its part of one common draw.
        """
        if not config.use_cpu_initialization:
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                for weight in self.weights:
                    init_method(weight)
            return
        out_features, in_features = self.shape.out_features, self.shape.in_features
        own = [
            matrix for weight in self.weights for matrix in weight.data.view(-1, out_features, in_features)
        ]
        tp_size, tp_rank = groups.expt_tp.size(), groups.expt_tp.rank()
        first = groups.ep.rank() * self.num_experts
        halves = 2 if self.shape.has_gate else 1
        for expert in range(groups.ep.size() * self.num_experts):
            if self.shape.split == "out":
                whole = torch.empty(halves, tp_size, out_features // halves, in_features)
                part = init_method(whole.view(-1, in_features)).view_as(whole)[:, tp_rank]
            else:
                whole = torch.empty(out_features, tp_size, in_features)
                part = init_method(whole.view(out_features, -1)).view_as(whole)[:, tp_rank]
            if first <= expert < first + self.num_experts:
                own[expert - first].copy_(part.reshape(out_features, in_features))


class UpProjection(ExpertStack):
    """The first projection: tokens [tokens, hidden] to gate and linear part [tokens, 2 * ffn], or without a
    gate to [tokens, ffn].
    """

    def forward(self, x: Tensor, offsets: Tensor, members: Tensor | None) -> Tensor:
        """Project; `members` is the one-hot matrix of `membership`, needed with biases."""
        y = grouped_linear(x, self.weights, offsets, self.products, self.accumulate)
        biases = self.biases
        return y if biases is None else torch.addmm(y, members, biases)


class DownProjection(ExpertStack):
    """The weighted activation and the second projection: [tokens, 2 * ffn] to [tokens, hidden]."""

    def __init__(self, config: TransformerConfig, shape: StackShape, **options: Any) -> None:
        super().__init__(config, shape, **options)
        self.activation: ExpertActivation = expert_activation(config)
        self.recompute = config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules

    def forward(self, x: Tensor, probabilities: Tensor, offsets: Tensor, members: Tensor | None) -> Tensor:
        """Activate and project; the bias too is weighted by the probability, as in Megatron-Core's MLP."""
        y = activated_grouped_linear(
            x,
            probabilities,
            self.weights,
            offsets,
            activation=self.activation,
            recompute=self.recompute,
            products=self.products,
            accumulate=self.accumulate,
        )
        return self.with_biases(y, probabilities, members)

    def with_biases(self, y: Tensor, probabilities: Tensor, members: Tensor | None) -> Tensor:
        """y [tokens, hidden] with each token's bias times its probability; as it is without biases."""
        biases = self.biases
        if biases is None or members is None:
            return y
        return (y + (members @ biases) * probabilities.unsqueeze(-1)).to(y.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFusions:
    """Kernels around the products that a recipe can ask for; without any, all is plain or compiled torch."""

    activation: Callable[[GatedActivation], GatedActivation] | None = None
    """The same activation on other kernels."""
    accumulate: Accumulate | None = None
    """What adds weight gradients to the gradient buffer."""

    def on(self, activation: ExpertActivation) -> ExpertActivation:
        """The activation on the kernels that are asked for, if any.

        Raises MissingRequirementError for one without a gate.
        """
        if self.activation is None:
            return activation
        if not isinstance(activation, GatedActivation):
            raise MissingRequirementError(
                "kernels.fusions.activation: the kernel is written for gated experts; set it to false"
            )
        return self.activation(activation)

    @property
    def names(self) -> tuple[str, ...]:
        """As a record names them."""
        asked = {"activation": self.activation, "gradient_accumulation": self.accumulate}
        return tuple(f"triton:{name}" for name, kernel in asked.items() if kernel is not None)


UNFUSED = ExpertFusions()


class GroupedExperts(MegatronModule):
    """All local experts of one layer, in the place of Megatron-Core's SequentialMLP or TEGroupedMLP."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
        *,
        are_apart: bool = False,
        products: Products = PLAIN,
        fusions: ExpertFusions = UNFUSED,
    ) -> None:
        """Build them; `are_apart` gives each a weight of its own, as Megatron-FSDP needs (`ExpertStack`)."""
        super().__init__(config=config)
        del name
        _refuse_what_is_not_here(config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(
            required_pgs=["ep", "expt_tp", "expt_dp"]
        )
        self.groups = groups
        self.num_local_experts = num_local_experts
        ffn, remainder = divmod(config.moe_ffn_hidden_size, groups.expt_tp.size())
        if remainder:
            raise MissingRequirementError(
                f"expert width {config.moe_ffn_hidden_size}: the expert-tensor-parallel size "
                f"{groups.expt_tp.size()} does not divide it; choose one that does"
            )
        hidden, has_gate = config.hidden_size, config.gated_linear_unit
        products.check_widths(
            dtype=config.params_dtype, hidden_size=hidden, expert_ffn_hidden_size_per_rank=ffn
        )
        self.linear_fc1 = UpProjection(
            config,
            StackShape(in_features=hidden, out_features=(1 + has_gate) * ffn, split="out", has_gate=has_gate),
            num_experts=num_local_experts,
            are_apart=are_apart,
            init_method=config.init_method,
            groups=groups,
        )
        self.linear_fc2 = DownProjection(
            config,
            StackShape(in_features=ffn, out_features=hidden, split="in"),
            num_experts=num_local_experts,
            are_apart=are_apart,
            init_method=config.output_layer_init_method,
            groups=groups,
        )
        for stack in (self.linear_fc1, self.linear_fc2):
            stack.products = products.of_stack(are_apart=are_apart)
        if are_apart and fusions.accumulate is not None:
            raise MissingRequirementError(
                "kernels.fusions.gradient_accumulation: Megatron-FSDP has no one buffer of all experts; "
                "set it to false"
            )
        self.linear_fc1.accumulate = self.linear_fc2.accumulate = fusions.accumulate
        self.linear_fc2.activation = fusions.on(self.linear_fc2.activation)
        self.implementation = "+".join((products.implementation, *fusions.names))

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, None]:
        """Run the experts.

        Args:
            permuted_local_hidden_states: [tokens, hidden], sorted by local expert; may be empty.
            tokens_per_expert: counts [local experts], on the host or the device.
            permuted_probs: [tokens], the router's weight of each row.

        Returns:
            [tokens, hidden] weighted by the probabilities, biases included; and None for a bias left to add.
        """
        x, probabilities = permuted_local_hidden_states, permuted_probs
        offsets = group_offsets(tokens_per_expert, x.device)
        members = membership(offsets, x.shape[0], x.dtype) if self.config.add_bias_linear else None
        if self.config.moe_apply_probs_on_input:
            x = (x * probabilities.unsqueeze(-1)).to(x.dtype)
            probabilities = torch.ones_like(probabilities)
        y = self.linear_fc1(x, offsets, members)
        return self.linear_fc2(y, probabilities, offsets, members), None

    def backward_dw(self) -> NoReturn:
        """Weight gradients are never held back: a configuration that asks for it is refused."""
        raise MissingRequirementError("the torch-native experts do not hold back weight gradients")

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The checkpoint of SequentialMLP: same keys, same global tensors."""
        if (metadata or {}).get("singleton_local_shards", False):
            raise MissingRequirementError(
                "checkpoint layout singleton_local_shards: torch-native experts do not write it; leave it off"
            )
        shards = self.shards(sharded_offsets)
        return {
            **sharded_parameters(self.linear_fc1, "linear_fc1", prefix, shards),
            **sharded_parameters(self.linear_fc2, "linear_fc2", prefix, shards),
        }

    def shards(self, leading: tuple[tuple[int, int, int], ...]) -> ExpertShards:
        """Where this rank's experts stand; `leading` as in `sharded_state_dict`."""
        return ExpertShards(
            ep_rank=self.groups.ep.rank(),
            ep_size=self.groups.ep.size(),
            tp_rank=self.groups.expt_tp.rank(),
            tp_size=self.groups.expt_tp.size(),
            dp_rank=self.groups.expt_dp.rank(),
            leading=tuple(leading),
        )


def _refuse_what_is_not_here(config: TransformerConfig) -> None:
    """Stop where the configuration asks the experts for more than plain BF16 or FP32 grouped GEMMs."""
    offloaded = set(config.offload_modules or ()) if config.fine_grained_activation_offloading else set()
    problems = (
        (config.delay_wgrad_compute, "delay_wgrad_compute"),
        (config.overlap_dispatch_backward_with_experts_wgrad, "overlap_dispatch_backward_with_experts_wgrad"),
        (config.fp8 or config.fp4, f"precision {config.fp8 or config.fp4}"),
        (config.moe_latent_size is not None, "moe_latent_size"),
        (config.moe_mlp_glu_interleave_size is not None, "moe_mlp_glu_interleave_size"),
        (config.use_transformer_engine_op_fuser, "use_transformer_engine_op_fuser"),
        (config.moe_paged_stash, "moe_paged_stash"),
        (offloaded & {"expert_fc1", "moe_act", "fused_group_mlp"}, f"offload_modules {sorted(offloaded)}"),
        (
            config.add_bias_linear and config.expert_tensor_parallel_size > 1,
            "biases cut over expert tensor ranks",
        ),
    )
    for is_problem, what in problems:
        if is_problem:
            raise MissingRequirementError(
                f"{what}: the torch-native experts do not have it; use the transformer_engine kernels"
            )
