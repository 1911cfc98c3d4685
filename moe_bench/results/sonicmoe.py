"""The twelve MoE layers of SonicMoE's figure 14, as cases and with the rates that the figure shows for them.

Source: arXiv:2512.14080, figure 14: one H100, BF16, SwiGLU; 6 T K d n operations forward, 12 T K d n backward
for T tokens, d hidden, n expert width, E experts of which K per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_bench.spec.kernel_family import FAST_PATH
from moe_bench.spec.layer_case import LayerCase, swiglu_case
from moe_bench.spec.recipe import Fusions

SUITE = "sonicmoe"
_TERA = 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRate:
    """Experts' operations over the time of the layer, measured off the figure's pixels: to 5 TFLOP/s."""

    forward_flops_per_s: float
    backward_flops_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SonicShape:
    """One group of bars."""

    num_tokens: int
    hidden_size: int
    expert_ffn_hidden_size: int
    num_experts: int
    top_k: int
    sonicmoe: PublishedRate
    megatron: PublishedRate

    @property
    def name(self) -> str:
        """`sonicmoe/t40960_d768_n256_e128_k8`"""
        return (
            f"{SUITE}/t{self.num_tokens}_d{self.hidden_size}_n{self.expert_ffn_hidden_size}"
            f"_e{self.num_experts}_k{self.top_k}"
        )

    def case(self, *, scale_down: int = 1) -> LayerCase:
        """The layer with random routing on the fast path; every size divided and nothing fused, for toys."""
        return swiglu_case(
            self.name,
            num_tokens=self.num_tokens // scale_down,
            hidden_size=self.hidden_size // scale_down,
            expert_ffn_hidden_size=self.expert_ffn_hidden_size // scale_down,
            num_experts=self.num_experts // scale_down,
            top_k=self.top_k if scale_down == 1 else min(self.top_k, 2),
            fusions=Fusions.model_validate(FAST_PATH) if scale_down == 1 else None,
        )


def _rate(forward_tflops: int, backward_tflops: int) -> PublishedRate:
    return PublishedRate(
        forward_flops_per_s=forward_tflops * _TERA, backward_flops_per_s=backward_tflops * _TERA
    )


def _shapes() -> tuple[SonicShape, ...]:
    """T, d, n, E, K, then SonicMoE forward and backward, then Megatron, in TFLOP/s."""
    rows = (
        (40960, 768, 256, 128, 8, 341, 370, 107, 139),
        (40960, 768, 512, 64, 4, 402, 402, 143, 161),
        (40960, 768, 1024, 32, 2, 409, 439, 176, 191),
        (24576, 1536, 256, 128, 8, 367, 409, 120, 133),
        (24576, 1536, 512, 64, 4, 439, 443, 167, 180),
        (24576, 1536, 1024, 32, 2, 472, 472, 209, 215),
        (32768, 4096, 256, 256, 16, 428, 460, 148, 131),
        (32768, 4096, 512, 128, 8, 503, 512, 224, 215),
        (32768, 4096, 1024, 64, 4, 553, 555, 290, 265),
        (32768, 4096, 512, 256, 16, 518, 527, 224, 202),
        (32768, 4096, 1024, 128, 8, 559, 568, 284, 273),
        (32768, 4096, 2048, 64, 4, 596, 587, 340, 314),
    )
    return tuple(
        SonicShape(
            num_tokens=tokens,
            hidden_size=hidden,
            expert_ffn_hidden_size=ffn,
            num_experts=experts,
            top_k=top_k,
            sonicmoe=_rate(sonic_forward, sonic_backward),
            megatron=_rate(megatron_forward, megatron_backward),
        )
        for (
            tokens,
            hidden,
            ffn,
            experts,
            top_k,
            sonic_forward,
            sonic_backward,
            megatron_forward,
            megatron_backward,
        ) in rows
    )


SHAPES = _shapes()


def sonic_shape(name: str) -> SonicShape | None:
    """The shape whose case has this name; None for another layer."""
    return next((shape for shape in SHAPES if shape.name == name), None)
