"""Compiles quack's kernels for a GPU that is not here, from the very calls of the experts.

    QUACK_ARCH=90 CUTE_DSL_ARCH=sm_90a QUACK_CACHE_DIR=DIR python -m tests.harness.kernels.quack.compiled

quack compiles before it launches (quack/cache/jit.py), and the launch refuses tensors of the host: a kernel
that is refused for that alone has been compiled for its arguments. What asks the driver for the number of
clusters that fit is answered, and the operator that exists for `cuda` alone is called as it is written.
"""

import sys
from collections.abc import Callable

import torch

from moe_bench.harness.kernels.quack import products
from moe_bench.harness.kernels.quack.products import Gradient
from moe_bench.harness.kernels.quack.rows import ExpertRows, rows_in_order, rows_of_chunks

TOKENS, HIDDEN, FFN, EXPERTS = 256, 256, 256, 8
REFUSED = "expected device_type=cuda"
CLUSTERS = 66


def values(*size: int) -> torch.Tensor:
    return torch.randn(size).bfloat16()


def calls(rows: ExpertRows) -> dict[str, Callable[[], object]]:
    """Every product on rows of 256 tokens, weight gradients written in BF16 and added in FP32."""
    up, down = values(EXPERTS, 2 * FFN, HIDDEN), values(EXPERTS, HIDDEN, FFN)
    x, pairs, wide = values(TOKENS, HIDDEN), values(TOKENS, 2 * FFN), values(TOKENS, FFN)
    written = {"up": torch.empty_like(up), "down": torch.empty_like(down)}
    added = {name: tensor.float() for name, tensor in written.items()}
    gradients = {
        f"{name} weight gradient, {'added' if accumulates else 'written'}": (name, tensor, accumulates)
        for tensors, accumulates in ((written, False), (added, True))
        for name, tensor in tensors.items()
    }

    def weight_gradient(name: str, tensor: torch.Tensor, accumulates: bool) -> None:
        into = Gradient(tensor=tensor, accumulates=accumulates)
        if name == "up":
            products.up_weight_gradient(x, pairs, rows, into)
        else:
            products.down_weight_gradient(x, wide, rows, into)

    return {
        "up": lambda: products.up(x, up, rows),
        "down": lambda: products.down(wide, down, rows),
        "down gradient": lambda: products.down_gradient(x, down, pairs, torch.rand(TOKENS), rows),
        "up input gradient": lambda: products.up_input_gradient(pairs, up, rows),
        **{label: lambda case=case: weight_gradient(*case) for label, case in gradients.items()},
    }


def without_a_gpu() -> None:
    interface = products.interface()
    interface.gemm_add_inplace_op = interface.gemm_add_inplace_op._init_fn
    for module in list(sys.modules.values()):
        if module.__name__.startswith("quack") and hasattr(module, "get_max_active_clusters"):
            module.get_max_active_clusters = lambda *args, **options: CLUSTERS


if __name__ == "__main__":
    without_a_gpu()
    counts = torch.full((2, EXPERTS), TOKENS // (2 * EXPERTS))
    host = torch.device("cpu")
    for kind, rows in (
        ("gathered", rows_of_chunks(counts, num_rows=TOKENS, device=host)),
        ("in order", rows_in_order(counts.sum(dim=0), num_rows=TOKENS, device=host)),
    ):
        for name, call in calls(rows).items():
            try:
                call()
            except ValueError as error:
                if REFUSED not in str(error):
                    raise
                sys.stdout.write(f"{kind}: {name}\n")
