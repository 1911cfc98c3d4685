"""Linear layers and experts of ours as nvidia-modelopt's, which knows those of Megatron-Core itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.mlp import MLP
from modelopt.torch.opt.dynamic import DynamicModule
from modelopt.torch.quantization.nn import (
    GroupedQuantizer,
    QuantInputBase,
    QuantLinearConvBase,
    QuantModule,
    QuantModuleRegistry,
    TensorQuantizer,
)
from modelopt.torch.quantization.plugins.custom import _ParallelLinear
from modelopt.torch.quantization.plugins.megatron import (
    _MegatronColumnParallelLinear,
    _MegatronRowParallelLinear,
)
from modelopt.torch.utils.distributed import ParallelState
from torch import Tensor
from torch.distributed import ProcessGroup

from moe_bench.harness.kernels.activation import GatedActivation
from moe_bench.harness.kernels.expert_checkpoint import ExpertShards
from moe_bench.harness.kernels.experts import DownProjection, GroupedExperts, UpProjection
from moe_bench.harness.kernels.grouped_linear import grouped_linear
from moe_bench.harness.kernels.mla import DuplicatedLinear
from moe_bench.harness.quantize.packed import HeldProducts


class _Holds(QuantModule):
    """A layer that may hold its weight packed, which then takes the place of the simulation."""

    held: HeldProducts | None = None

    @property
    def products_held(self) -> HeldProducts | None:
        """None where nothing is packed, and where the quantisers are off."""
        return self.held if self.held is not None and self.weight_quantizer.is_enabled else None


class _DenseHolds(_Holds):
    """Megatron-Core's linear layers, whose `_forward_impl` is a product and no more."""

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        sequence_parallel: bool,
        tp_group: ProcessGroup | None,
        **of_gradients: Any,
    ) -> Tensor:
        held = self.products_held
        if held is None:
            return super()._forward_impl(
                input, weight, bias, sequence_parallel=sequence_parallel, tp_group=tp_group, **of_gradients
            )
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        y = held.linear(input)
        return y if bias is None else y + bias


class QuantColumnParallelLinear(_DenseHolds, _MegatronColumnParallelLinear):
    """modelopt's, which may hold its weight packed."""


class QuantRowParallelLinear(_DenseHolds, _MegatronRowParallelLinear):
    """modelopt's, which may hold its weight packed."""


class QuantDuplicatedLinear(_Holds, _ParallelLinear):
    """Quantised where the layer multiplies, as in modelopt's plugin for Megatron-Core.

    Each tensor-parallel rank has other tokens and the same weight, so that the ranks agree on the largest
    input as those of a column-parallel layer do.
    """

    _functionals_to_replace = ((torch.nn.functional, "linear"),)
    _is_column_parallel = True

    def _setup(self) -> None:
        self.parallel_state = ParallelState(
            parallel_state.get_data_parallel_group(with_context_parallel=True),
            parallel_state.get_tensor_model_parallel_group(),
        )
        super()._setup()

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """As `DuplicatedLinear`."""
        held = self.products_held
        return super().forward(x) if held is None else (held.linear(x), None)


class _QuantStack(_Holds):
    """One projection of all local experts: one quantiser for their tokens, one for each weight.

    So has modelopt's TEGroupedLinear, and its SequentialMLP gives all experts the largest input's scale
    (max_calibrate, sync_moe_expert_amax). A rank without a token keeps to what the others saw.
    """

    num_experts: int

    def _setup(self) -> None:
        self.parallel_state = ParallelState(
            parallel_state.get_expert_data_parallel_group(),
            tensor_parallel_group=parallel_state.get_expert_tensor_parallel_group(),
            expert_model_parallel_group=parallel_state.get_expert_model_parallel_group(),
        )
        self.input_quantizer = TensorQuantizer(QuantInputBase.default_quant_desc_input)
        each = (
            TensorQuantizer(QuantLinearConvBase.default_quant_desc_weight) for _ in range(self.num_experts)
        )
        self.weight_quantizer = GroupedQuantizer(*each)

    @property
    def weight0(self) -> Tensor:
        """What modelopt knows grouped linear layers by, whose amax it reduces over tensor ranks."""
        return self.get_parameter("weight")[0]

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """As `ExpertStack`, each expert's matrix rounded by its own quantiser."""
        if not self.weight_quantizer.is_enabled:
            return super().weights
        rounded = [quantizer(matrix) for matrix, quantizer in self.iter_weights_for_calibration()]
        return (torch.stack(rounded),)

    def multiplied(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [tokens, in], as it comes, times each expert's matrix: [tokens, out]."""
        held = self.products_held
        if held is not None:
            return held.grouped(x, offsets)
        return grouped_linear(self.input_quantizer(x), self.weights, offsets, self.products)

    def iter_weights_for_calibration(self) -> Iterator[tuple[Tensor, TensorQuantizer]]:
        """Matrix [out, in] and quantiser of each local expert."""
        yield from zip(self.get_parameter("weight").unbind(0), self.weight_quantizer, strict=True)


class QuantUpProjection(_QuantStack):
    """Tokens are rounded as they come in."""

    _is_column_parallel = True

    def forward(self, x: Tensor, offsets: Tensor, members: Tensor | None) -> Tensor:
        """As `UpProjection`."""
        y = self.multiplied(x, offsets)
        biases = self.biases
        return y if biases is None else torch.addmm(y, members, biases)


class QuantDownProjection(_QuantStack):
    """Tokens are rounded between activation and product, which are therefore two steps."""

    _is_row_parallel = True

    def forward(self, x: Tensor, probabilities: Tensor, offsets: Tensor, members: Tensor | None) -> Tensor:
        """As `DownProjection`."""
        hidden = _Activated.apply(x, probabilities, self.activation)
        return self.with_biases(self.multiplied(hidden, offsets), probabilities, members)


class _Activated(torch.autograd.Function):
    """The experts' activation with its own gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probabilities: Tensor, activation: GatedActivation) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(x, probabilities)
        return activation.forward(x, probabilities)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.activation.backward(grad, *ctx.saved_tensors), None)


class QuantGroupedExperts(DynamicModule):
    """Experts whose checkpoint holds the largest values of their quantisers, by global number."""

    def _setup(self) -> None:
        """Nothing of its own: the two projections are converted by themselves."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """As `GroupedExperts`."""
        tensors = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        shards = self.shards(sharded_offsets)
        for name in ("linear_fc1", "linear_fc2"):
            for local_name, amax in getattr(self, name).named_buffers():
                if local_name.endswith("._amax"):
                    key = f"{prefix}experts.{name}.{local_name}"
                    tensors[f"{prefix}{name}.{local_name}"] = _sharded_amax(
                        key, amax, shards, num_local_experts=self.num_local_experts
                    )
        return tensors


def _sharded_amax(key: str, amax: Tensor, shards: ExpertShards, *, num_local_experts: int) -> ShardedTensor:
    """Of an expert's weight, a place in a global tensor [experts]; of the inputs of all, a scalar."""
    places, owner = shards.leading, shards.ep_rank
    before, _, expert = key.removesuffix("._amax").rpartition(".")
    if expert.isdecimal():
        index = shards.ep_rank * num_local_experts + int(expert)
        places = (*places, shards.fragment(0, index, shards.ep_size * num_local_experts))
        key, owner = f"{before}._amax", 0
    return ShardedTensor.from_rank_offsets(
        key,
        amax,
        *places,
        replica_id=(owner, shards.tp_rank, shards.dp_rank),
        prepend_axis_num=len(places),
    )


def register_layers() -> None:
    """Tell modelopt of them, once for the process.

    Its own MLP asks for another layout of checkpoints (singleton_local_shards), for the sake of scales that
    are divided as the weights are. Scales of whole tensors need none.
    """
    if DuplicatedLinear in QuantModuleRegistry:
        return
    for theirs in (ColumnParallelLinear, RowParallelLinear, MLP):
        QuantModuleRegistry.unregister(theirs)
    ours = {
        ColumnParallelLinear: QuantColumnParallelLinear,
        RowParallelLinear: QuantRowParallelLinear,
        DuplicatedLinear: QuantDuplicatedLinear,
        UpProjection: QuantUpProjection,
        DownProjection: QuantDownProjection,
        GroupedExperts: QuantGroupedExperts,
    }
    for module, quantised in ours.items():
        QuantModuleRegistry.register({module: f"moe_bench.{module.__name__}"})(quantised)
