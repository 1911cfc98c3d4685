"""Core attention for Megatron-Core from torch alone: MLA, GQA, windows, sinks and context parallelism."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.kernels.attention_kernels import (
    block_mask,
    blockwise_attention,
    flash_attention,
    is_visible,
    masked_attention,
    zigzag_positions,
)

AttentionName = Literal["torch:sdpa_flash", "torch:flex", "torch:masked"]

MAX_FUSED_CHANNELS = 256
"""Widest head that torch's flash kernel takes (sdp_utils.cpp, check_head_dim_size_flash)."""
MIN_FLEX_CHANNELS = 16
"""Narrowest head that flex attention's Triton template takes (one tensor-core tile)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionFeatures:
    """What one attention layer must do, as far as it decides which kernel can do it."""

    dtype: torch.dtype
    k_channels: int
    v_channels: int
    window: int | None
    """Tokens before itself that a query sees; None for all."""
    has_sink: bool
    cp_size: int


def attention_implementation(device_type: str, features: AttentionFeatures) -> AttentionName:
    """Name the kernel for these features: the one rule, so that a record can be read back.

    On the CPU, and in FP32, which no flash kernel has: masked. On a GPU: torch's flash kernel for plain
    causal attention; flex where a window, a sink (it needs the log-sum-exp and its gradient, which torch's
    flash kernel does not offer) or context parallelism (out-of-order positions) asks for more.

    Raises:
        MissingRequirementError: no kernel of torch can do it.
    """
    if device_type == "cpu":
        return "torch:masked"
    if device_type != "cuda":
        raise MissingRequirementError(
            f"torch-native attention runs on cpu and cuda, not on {device_type}; choose one of the two"
        )
    if features.dtype not in (torch.bfloat16, torch.float16):
        return "torch:masked"
    widths = f"key and value widths {features.k_channels} and {features.v_channels}"
    if features.k_channels > MAX_FUSED_CHANNELS or features.v_channels > features.k_channels:
        raise MissingRequirementError(
            f"{widths}: torch's fused kernels need values no wider than keys and keys of at most "
            f"{MAX_FUSED_CHANNELS}; use the transformer_engine kernels"
        )
    if features.window is None and not features.has_sink and features.cp_size == 1:
        return "torch:sdpa_flash"
    if features.v_channels < MIN_FLEX_CHANNELS:
        raise MissingRequirementError(
            f"{widths}: flex attention needs at least {MIN_FLEX_CHANNELS}; use the transformer_engine kernels"
        )
    return "torch:flex"


class CoreAttention(MegatronModule):
    """Attention between the projections, with the constructor and checkpoint keys of DotProductAttention.

    Under context parallelism each rank holds two chunks of the sequence (`zigzag_positions`); keys and values
    are all-gathered in rank order, which the mask undoes by true positions, and their gradients
    reduce-scattered.
    """

    def __init__(  # noqa: PLR0913  Megatron-Core calls it with these.
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        device_type: str,
    ) -> None:
        super().__init__(config=config)
        _refuse_what_is_not_here(config, attn_mask_type, attention_type, attention_dropout, cp_comm_type)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.tp_group, self.cp_group = groups.tp, groups.cp
        k_channels = k_channels or config.kv_channels
        self.softmax_scale = softmax_scale if softmax_scale is not None else 1 / math.sqrt(k_channels)
        self.window = _window(config, layer_number)
        self.features = AttentionFeatures(
            dtype=config.params_dtype,
            k_channels=k_channels,
            v_channels=v_channels or k_channels,
            window=self.window,
            has_sink=config.softmax_type != "vanilla",
            cp_size=self.cp_group.size(),
        )
        self.device_type = device_type
        self.implementation = attention_implementation(device_type, self.features)
        self.block_masks: dict[int, BlockMask] = {}
        self._make_sink(config)

    def _make_sink(self, config: TransformerConfig) -> None:
        """One logit per head of this rank: learned, or zero for the softmax that is off by one."""
        num_heads = config.num_attention_heads // self.tp_group.size()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        if config.softmax_type == "learnable":
            sink = torch.nn.Parameter(torch.empty(num_heads, device=device, dtype=config.params_dtype))
            if config.perform_initialization:
                config.init_method(sink)
            # Without the mark, gradient clipping counts it on the first tensor-parallel rank only.
            set_tensor_model_parallel_attributes(sink, True, 0, 1)
            self.softmax_offset: Tensor | None = sink
        elif config.softmax_type == "off-by-one":
            zeros = torch.zeros(num_heads, device=device, dtype=config.params_dtype)
            self.register_buffer("softmax_offset", zeros, persistent=False)
        else:
            self.softmax_offset = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend; shapes as in `attention_kernels`. The mask is causal and built in: pass None."""
        for name, given in (
            ("attention_mask", attention_mask),
            ("attention_bias", attention_bias),
            ("packed_seq_params", packed_seq_params),
        ):
            if given is not None:
                raise MissingRequirementError(
                    f"{name}: torch-native attention is causal over whole sequences; pass None"
                )
        if attn_mask_type is not None:
            _refuse_other_masks(attn_mask_type)
        if self.features.cp_size > 1:
            key, value = (self._gathered(tensor) for tensor in (key, value))
        if self.implementation == "torch:sdpa_flash":
            return flash_attention(query, key, value, scale=self.softmax_scale)
        sink = self.softmax_offset
        if self.implementation == "torch:flex":
            mask = self._block_mask(query)
            return blockwise_attention(query, key, value, scale=self.softmax_scale, mask=mask, sink=sink)
        query_positions, key_positions = self._positions(query)
        visible = is_visible(query_positions[:, None], key_positions[None, :], self.window)
        return masked_attention(query, key, value, scale=self.softmax_scale, visible=visible, sink=sink)

    def _gathered(self, tensor: Tensor) -> Tensor:
        return gather_from_sequence_parallel_region(
            tensor.contiguous(), tensor_parallel_output_grad=True, group=self.cp_group
        )

    def _positions(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of this rank's queries, and of the keys in the order in which they are gathered."""
        ranks = [
            zigzag_positions(query.shape[0], cp_size=self.features.cp_size, cp_rank=rank, device=query.device)
            for rank in range(self.features.cp_size)
        ]
        return ranks[self.cp_group.rank()], torch.cat(ranks)

    def _block_mask(self, query: Tensor) -> BlockMask:
        """The block mask for this sequence length, made once: lengths do not change within a run."""
        num_queries = query.shape[0]
        if num_queries not in self.block_masks:
            self.block_masks[num_queries] = block_mask(*self._positions(query), self.window)
        return self.block_masks[num_queries]

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The learned sinks, split over the tensor-parallel group by heads."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


def _window(config: TransformerConfig, layer_number: int) -> int | None:
    """Tokens before itself that a query of this layer sees, None for all."""
    size = config.window_size
    if not is_layer_window_attention(size, config.window_attn_skip_freq, layer_number):
        return None
    before, after = size
    if after != 0:
        raise MissingRequirementError(
            f"window_size {size}: torch-native windows are causal; the second number must be 0"
        )
    return before if before >= 0 else None


def _refuse_what_is_not_here(
    config: TransformerConfig,
    attn_mask_type: AttnMaskType,
    attention_type: str,
    attention_dropout: float | None,
    cp_comm_type: str | None,
) -> None:
    """Stop where plain causal self-attention would be something else than what was asked for."""
    dropout = config.attention_dropout if attention_dropout is None else attention_dropout
    problems = (
        (attention_type != "self", f"attention_type {attention_type}"),
        (dropout != 0.0, f"attention_dropout {dropout}"),
        (config.apply_query_key_layer_scaling, "apply_query_key_layer_scaling"),
        (cp_comm_type not in (None, "all_gather"), f"cp_comm_type {cp_comm_type} (only all_gather)"),
        (config.fp8_dot_product_attention, "fp8_dot_product_attention"),
    )
    for is_problem, what in problems:
        if is_problem:
            raise MissingRequirementError(
                f"{what}: torch-native attention does not have it; use the transformer_engine kernels"
            )
    _refuse_other_masks(attn_mask_type)


def _refuse_other_masks(attn_mask_type: AttnMaskType) -> None:
    if attn_mask_type != AttnMaskType.causal:
        raise MissingRequirementError(
            f"attention mask {attn_mask_type.name}: torch-native attention is causal; "
            "use the transformer_engine kernels"
        )
