"""Adds rows up by the kernel under Triton's interpreter; run with TRITON_INTERPRET=1.

python -m tests.harness.kernels.quack.interpreted INPUTS OUTPUTS
"""

import sys

import torch

from moe_bench.harness.kernels.quack.gather_sum_kernel import gather_sum_on_gpu

if __name__ == "__main__":
    inputs = torch.load(sys.argv[1])
    torch.save([gather_sum_on_gpu(*arguments) for arguments in inputs], sys.argv[2])
