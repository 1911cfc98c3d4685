"""Quantizes the tensors of a file by the kernels under Triton's interpreter; run with TRITON_INTERPRET=1.

    python -m tests.harness.kernels.interpreted_fp8 INPUTS OUTPUTS

The interpreter rounds numbers to FP8 without carrying into the exponent (triton 3.9 runtime/interpreter.py,
_convert_float), so torch does that one conversion; every address, mask, maximum and scale is the kernel's.
"""

import sys
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from moe_bench.harness.kernels.fp8_quantize import E4M3, quantize_columns, quantize_rows

_convert = interpreter._convert_float


def convert(values: Any, from_type: Any, to_type: Any, rounding: Any) -> Any:
    if (from_type, to_type) != (tl.float32, tl.float8e4nv):
        return _convert(values, from_type, to_type, rounding)
    return torch.from_numpy(values.astype(np.float32)).to(E4M3).view(torch.uint8).numpy()


def main(inputs: str, outputs: str) -> None:
    tensors: dict[str, torch.Tensor] = torch.load(inputs)
    functions = {"rows": quantize_rows, "columns": quantize_columns}
    with mock.patch.object(interpreter, "_convert_float", convert):
        found = {name: tuple(functions[name.split()[0]](x)) for name, x in tensors.items()}
    torch.save(found, outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
