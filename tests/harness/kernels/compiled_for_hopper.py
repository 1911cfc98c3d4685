"""Compile every kernel for sm_90, which needs no GPU, and say what ptxas gave it.

    python -m tests.harness.kernels.compiled_for_hopper

Sizes are those of DeepSeek-V3, and the activation is the one with most to do, that of GPT-OSS.
Prints JSON: for each kernel its registers, its bytes of spilled registers and of shared memory.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from moe_bench.harness.kernels import fp8_quantize
from moe_bench.harness.kernels.fused import (
    activation,
    chunk_order,
    permutation,
    routing,
    row_map,
    weight_gradient,
)
from moe_bench.harness.kernels.quack import gather_sum_kernel

HOPPER = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A kernel and how it is launched; arguments without a type here are int32."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = field(default=())
    """Sizes that are multiples of 16."""

    @property
    def options(self) -> dict[str, Any]:
        """As Triton takes them; multiplications and additions fuse, which it stops doing unasked in 3.10."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


def launches() -> dict[str, Launch]:
    blocks = {"block_t": 8, "block_e": 256}
    wgrad, tile = weight_gradient, weight_gradient.HOPPER
    choice = routing.Choice(top_k=8, score="sigmoid", num_groups=8, groups_per_token=4, scale=2.5)
    of_choice = routing._launch(4096, 256, choice)[1]
    for option in ("num_warps", "enable_fp_fusion"):
        of_choice.pop(option)
    groups = {"top_k": 8, "num_groups": 8, "groups_per_token": 4, "per_group": 2}
    gated = {"alpha": 1.702, "offset": 1.0, "clamp": 7.0, "block": 1024}
    quantized = {"x": "*bf16", "values": "*fp8e4nv", "scales": "*fp32"}
    return {
        "routing.forward": Launch(
            kernel=routing._forward_kernel,
            types={"logits": "*fp32", "bias": "*fp32", "weights": "*fp32", "chosen": "*u8"},
            constants={**of_choice, **groups, "is_before": False, "has_bias": True},
            aligned=("num_experts",),
        ),
        "routing.backward": Launch(
            kernel=routing._backward_kernel,
            types={"grad": "*fp32", "logits": "*fp32", "chosen": "*u8", "grad_logits": "*fp32"},
            constants=of_choice,
            aligned=("num_experts",),
        ),
        "row_map.count": Launch(
            kernel=row_map._count_kernel, types={"map": "*u8", "counts": "*i32"}, constants=blocks
        ),
        "row_map.number": Launch(
            kernel=row_map._number_kernel,
            types={"map": "*u8", "counts": "*i32", "ends": "*i32", "slots": "*i32"},
            constants={**blocks, "block_s": 8},
        ),
        "permutation.spread": Launch(
            kernel=permutation._spread_kernel,
            types={"tokens": "*bf16", "probabilities": "*fp32", "slots": "*i32", "rows": "*bf16"}
            | {"row_probabilities": "*fp32"},
            constants={"has_probabilities": True, "block_h": permutation.BLOCK_H},
            aligned=("hidden_size",),
        ),
        "permutation.gather": Launch(
            kernel=permutation._gather_kernel,
            types={"rows": "*bf16", "slots": "*i32", "tokens": "*bf16"},
            constants={"block_h": permutation.BLOCK_H},
            aligned=("hidden_size",),
        ),
        "permutation.probability_gradient": Launch(
            kernel=permutation._probability_gradient_kernel,
            types={"grad": "*fp32", "slots": "*i32", "out": "*fp32"},
            constants={"block_t": 128},
        ),
        "chunk_order.source": Launch(
            kernel=chunk_order._source_kernel,
            types={"ends_as_sent": "*i32", "ends_as_sorted": "*i32", "sources": "*i32"},
            constants={"block_r": chunk_order.BLOCK_R, "block_c": 256},
        ),
        "chunk_order.move": Launch(
            kernel=chunk_order._move_kernel,
            types={"rows": "*bf16", "probabilities": "*fp32", "sources": "*i32", "moved": "*bf16"}
            | {"moved_probabilities": "*fp32"},
            constants={"is_inverse": False, "has_probabilities": True, "block_h": chunk_order.BLOCK_H},
            aligned=("hidden_size",),
        ),
        "activation.forward": Launch(
            kernel=activation._forward_kernel,
            types={"x": "*bf16", "probabilities": "*fp32", "y": "*bf16"},
            constants=gated,
            aligned=("ffn",),
        ),
        "activation.backward": Launch(
            kernel=activation._backward_kernel,
            types={"grad": "*bf16", "x": "*bf16", "probabilities": "*fp32", "grad_x": "*bf16"}
            | {"grad_probabilities": "*fp32"},
            constants=gated,
            aligned=("ffn",),
        ),
        "weight_gradient": Launch(
            kernel=wgrad._accumulate_kernel,
            types={
                "grad_boxes": f"tensordesc<bf16[{tile.rows}, {tile.outputs}]>",
                "x_boxes": f"tensordesc<bf16[{tile.rows}, {tile.inputs}]>",
                "main_grad": "*fp32",
                "offsets": "*i32",
            },
            constants={"block_k": tile.rows, "block_m": tile.outputs, "block_n": tile.inputs}
            | {"band": tile.band},
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            aligned=("out_features", "in_features"),
        ),
        "fp8_quantize.rows": Launch(
            kernel=fp8_quantize._rows_kernel,
            types=quantized,
            constants={"block": 8192},
            num_warps=fp8_quantize._MAX_WARPS,
            aligned=("columns",),
        ),
        "fp8_quantize.columns": Launch(
            kernel=fp8_quantize._columns_kernel,
            types=quantized,
            constants={"tile_rows": fp8_quantize._TILE_ROWS, "tile_columns": fp8_quantize._TILE_COLUMNS},
            aligned=("rows", "columns"),
        ),
        "gather_sum": Launch(
            kernel=gather_sum_kernel._gather_sum_kernel,
            types={"rows": "*bf16", "row_of_slot": "*i32", "weights": "*fp32", "tokens": "*bf16"},
            constants={"num_slots": 8, "has_weights": True, "sum_type": tl.float32}
            | {"block_h": gather_sum_kernel.BLOCK_H},
            num_warps=gather_sum_kernel.NUM_WARPS,
            aligned=("hidden_size",),
        ),
    }


def source(launch: Launch) -> ASTSource:
    """The kernel with the types and constants of its launch."""
    names = launch.kernel.arg_names
    signature = {
        name: "constexpr" if name in launch.constants else launch.types.get(name.removesuffix("_ptr"), "i32")
        for name in names
    }
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name in launch.aligned
    }
    return ASTSource(launch.kernel, signature, launch.constants, attributes)


def triton_ir(launch: Launch) -> str:
    """What Triton reads the kernel as, its first step and the one that resolves every name and type."""
    backend, context = make_backend(HOPPER), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options(launch.options)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    return str(source(launch).make_ir(HOPPER, options, functions, modules, context))


def compiled(launch: Launch) -> dict[str, int]:
    """Registers of a thread, bytes that it spills, bytes of shared memory of a program."""
    kernel = triton.compile(
        source(launch),
        target=HOPPER,
        options=launch.options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout.split()
    found = dict(part.split(":") for part in usage if part.startswith(("REG:", "STACK:")))
    return {
        "registers": int(found["REG"]),
        "spilled_bytes": int(found["STACK"]),
        "shared_bytes": kernel.metadata.shared,
        "num_tensor_core_calls": kernel.asm["ptx"].count("wgmma.mma_async"),
    }


if __name__ == "__main__":
    json.dump({name: compiled(launch) for name, launch in launches().items()}, sys.stdout)
