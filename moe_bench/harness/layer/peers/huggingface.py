"""Hugging Face transformers' MoE blocks as engines: five routers, each with the experts run in several ways.

In transformers 5 an experts module runs as its configuration says (integrations/moe.py): `eager`, a loop over
the experts that were chosen; `grouped_mm`, torch's grouped product over sorted rows; `batched_mm`, a batched
product over a copy of the expert's weights for every row; `sonicmoe`, the kernels of arXiv:2512.14080 for
Hopper and later, which the package kernels fetches from its hub.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.layer.engine import BuiltLayer
from moe_bench.harness.layer.peers import obstacles
from moe_bench.harness.layer.peers.huggingface_blocks import BLOCKS, Block
from moe_bench.harness.layer.peers.modules import drop_gradients
from moe_bench.harness.layer.weights import LayerWeights
from moe_bench.spec.layer_case import LayerCase

PIP_LINE = 'pip install "transformers>=5"'
SONICMOE_PIP_LINE = "pip install kernels nvidia-cutlass-dsl apache-tvm-ffi"
"""What integrations/sonicmoe.py asks for."""
Implementation = Literal["eager", "grouped_mm", "batched_mm", "sonicmoe"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("eager", "grouped_mm", "batched_mm", "sonicmoe")


@dataclass(frozen=True, slots=True)
class HuggingFace:
    """One block with one way to run its experts."""

    block: Block
    implementation: Implementation
    package: str = "transformers"

    @property
    def name(self) -> str:
        """`hf_<model>_<way>`."""
        return f"hf_{self.block.model}_{self.implementation}"

    @property
    def groups(self) -> tuple[str, ...]:
        """Names that stand for several of these: all, the block in every way, every block in this way."""
        return ("hf", f"hf_{self.block.model}", f"hf_{self.implementation}")

    def obstacle(self, case: LayerCase) -> str | None:
        """Why it cannot run the case: absent, or another layer than this block's."""
        return (
            obstacles.not_plain(case)
            or self.block.cannot(case)
            or self._cannot_run_experts(case)
            or obstacles.not_installed("transformers", PIP_LINE)
        )

    def _cannot_run_experts(self, case: LayerCase) -> str | None:
        if self.implementation == "sonicmoe":
            return _no_sonicmoe(case)
        return _copies_too_much(case) if self.implementation == "batched_mm" else None

    def _require_chosen(self, config: Any) -> None:
        """Raise where this transformers does not know the way: older ones take the loop in its place."""
        known = import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS
        chosen = getattr(config, "_experts_implementation", None)
        if chosen != self.implementation or chosen not in ("eager", *known):
            raise MissingRequirementError(
                f"{self.name}: transformers has no experts_implementation {self.implementation!r}; {PIP_LINE}"
            )

    @contextmanager
    def build(self, case: LayerCase, weights: LayerWeights, *, device: str) -> Iterator[BuiltLayer]:
        """The block, on the memory of `weights` where its layout is theirs, on copies where it is not."""
        if (reason := self.obstacle(case)) is not None:
            raise MissingRequirementError(f"{self.name}: {reason}")
        del device  # where the weights are
        folder = f"transformers.models.{self.block.model}"
        configuration = import_module(f"{folder}.configuration_{self.block.model}")
        modeling = import_module(f"{folder}.modeling_{self.block.model}")
        config_class = getattr(configuration, self.block.config_class)
        block_class = getattr(modeling, self.block.block_class)
        config = config_class(experts_implementation=self.implementation, **self.block.config(case))
        with torch.device("meta"):
            block = block_class(config)
        self._require_chosen(config)
        self.block.place(block, weights)

        def forward(x: Tensor) -> Tensor:
            output = block(x.unsqueeze(0))
            # GPT-OSS returns the router's scores as well
            return (output[0] if isinstance(output, tuple) else output).squeeze(0)

        yield BuiltLayer(
            forward=forward,
            gradients=partial(self.block.gradients, block),
            clear_gradients=partial(drop_gradients, block),
            implementation=f"{self.block.block_class}:{self.implementation}",
            module=block,
        )


def hugging_face_engines() -> tuple[HuggingFace, ...]:
    """Every block with every way to run its experts."""
    return tuple(HuggingFace(block, way) for block in BLOCKS for way in IMPLEMENTATIONS)


def _no_sonicmoe(case: LayerCase) -> str | None:
    return obstacles.first_problem(
        (
            (case.activation.kind != "swiglu", f"its experts are SwiGLU, not {case.activation.kind}"),
            (case.precision != "bf16", f"its products are BF16, not {case.precision}"),
            (not torch.cuda.is_available(), "its kernels run on a GPU"),
        )
    ) or obstacles.not_installed("kernels", SONICMOE_PIP_LINE)


def _copies_too_much(case: LayerCase) -> str | None:
    """That a copy of three matrices for every row is more than the GPU has."""
    if not torch.cuda.is_available():
        return None
    weight = 3 * case.hidden_size * case.moe.expert_ffn_hidden_size
    num_bytes = case.num_rows * weight * (4 if case.precision == "fp32" else 2)
    if num_bytes <= torch.cuda.get_device_properties(0).total_memory:
        return None
    return f"copies its expert's weights for every row, {num_bytes / 2**30:,.0f} GiB: more than the GPU has"
