"""Megatron-Core's experts on quack-kernels, with the torch-native ones' parameters and checkpoints."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.kernels.activation import GatedActivation
from moe_bench.harness.kernels.experts import GroupedExperts
from moe_bench.harness.kernels.quack.functions import gathered_experts
from moe_bench.harness.kernels.quack.rows import ExpertRows, rows_in_order

PIP = "pip install 'moe_bench[quack]'"
IMPLEMENTATION = "quack:gemm_gated+gather"
MIN_COMPUTE_CAPABILITY = 9
"""Hopper, the oldest GPU that this composition of the kernels is published for (arXiv:2512.14080)."""
ALIGNMENT = 8
"""BF16 elements of 16 bytes, which quack's bulk copies address (quack/gemm_tvm_ffi_utils.py)."""


def require_quack(device_type: str) -> None:
    """Raise MissingRequirementError unless the package is installed and the GPU new enough."""
    if find_spec("quack") is None:
        raise MissingRequirementError(
            f"kernels.family: quack needs the package quack-kernels, not installed; {PIP}"
        )
    if device_type != "cuda":
        raise MissingRequirementError(
            f"kernels.family: quack runs on a GPU, not on {device_type}; use torch_native here"
        )
    if torch.cuda.get_device_capability()[0] < MIN_COMPUTE_CAPABILITY:
        raise MissingRequirementError(
            f"kernels.family: quack needs Hopper or Blackwell, this is {torch.cuda.get_device_name()}; "
            "use torch_native"
        )


class QuackExperts(GroupedExperts):
    """All local experts of one layer; rows that nobody has permuted are gathered by the products."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
        *,
        accumulates: bool = False,
    ) -> None:
        """Build them; `accumulates` lets the products add weight gradients to the gradient buffer."""
        _refuse_what_quack_lacks(config)
        super().__init__(num_local_experts, config, pg_collection, name)
        self.accumulates = accumulates
        self.implementation = IMPLEMENTATION + ("+gemm_add_inplace" if accumulates else "")
        if self.linear_fc2.activation != GatedActivation(alpha=1.0):
            raise MissingRequirementError(
                "kernels.family: quack: its experts are gated by SiLU, without offset or clamp; "
                "use torch_native"
            )

    def forward(
        self, hidden_states: Tensor, rows: ExpertRows | Tensor, probabilities: Tensor
    ) -> tuple[Tensor, None]:
        """Run the experts.

        Args:
            hidden_states: [tokens, hidden].
            rows: which token each row is; or, from a dispatcher that permutes, the tokens per expert
                [experts], every token being one row in their order.
            probabilities: [rows], the router's weight of each.

        Returns:
            [tokens, hidden], each token's weighted rows added up; and None for a bias left to add.
        """
        if isinstance(rows, Tensor):
            num_rows = hidden_states.shape[0]
            rows = rows_in_order(rows, num_rows=num_rows, device=hidden_states.device)
        up, down = self.linear_fc1.weights[0], self.linear_fc2.weights[0]
        return gathered_experts(
            hidden_states, probabilities, up, down, rows, accumulates=self.accumulates
        ), None


def _refuse_what_quack_lacks(config: TransformerConfig) -> None:
    """Stop before the parameters are made; legality (spec/legality/quack.py) says the same of a recipe."""
    problems = (
        (config.add_bias_linear, "biases"),
        (config.moe_apply_probs_on_input, "moe_apply_probs_on_input"),
        (config.expert_tensor_parallel_size > 1, "expert tensor parallelism"),
        (config.hidden_size % ALIGNMENT, f"hidden_size {config.hidden_size}, not a multiple of {ALIGNMENT}"),
        (
            config.moe_ffn_hidden_size % ALIGNMENT,
            f"expert width {config.moe_ffn_hidden_size}, not a multiple of {ALIGNMENT}",
        ),
    )
    for is_problem, what in problems:
        if is_problem:
            raise MissingRequirementError(
                f"kernels.family: quack: its experts do not have {what}; use torch_native"
            )
