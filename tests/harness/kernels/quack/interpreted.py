"""Adds rows up, and numbers them, by kernels under Triton's interpreter; run with TRITON_INTERPRET=1.

python -m tests.harness.kernels.quack.interpreted INPUTS OUTPUTS
"""

import sys

import torch

from moe_bench.harness.kernels.quack.gather_sum_kernel import gather_sum_on_gpu
from moe_bench.harness.kernels.quack.rows import rows_of_routing_map

if __name__ == "__main__":
    given = torch.load(sys.argv[1])
    rows, probabilities = rows_of_routing_map(*given["routing"], top_k=3, is_fused=True)
    sums = [gather_sum_on_gpu(*arguments) for arguments in given["sums"]]
    torch.save({"sums": sums, "rows": (*rows.tensors, probabilities)}, sys.argv[2])
