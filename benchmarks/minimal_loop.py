"""The least that trains an MoE model with Megatron-Core on one CPU process, to measure the harness against.

It imports nothing of moe_bench, and has its own few lines that let Megatron-Core run without a GPU. Started
by harness_overhead.py, it runs a block of steps for every number of steps that it reads, and prints the time.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import warnings
from typing import Any

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import torch  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

SEQ_LEN = 512
VOCAB_SIZE = 2048
NUM_MICRO_BATCHES = 2
NUM_LAYERS = 2
HIDDEN_SIZE = 384
NUM_HEADS = 4
NUM_QUERY_GROUPS = 2
NUM_EXPERTS = 8
TOP_K = 2
EXPERT_FFN_HIDDEN_SIZE = 768
LEARNING_RATE = 1e-4


class CudaIsCpu(TorchFunctionMode):
    """Make on the CPU what is asked for on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = "cpu"
        name = getattr(func, "__name__", "")
        if name == "cuda":
            return args[0]
        if name == "type" and len(args) == 1:
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


class Idle:
    """A stream or an event that is always done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self


def replace_cuda() -> None:
    """Put stand-ins in the place of what this loop touches of CUDA."""
    cuda: Any = torch.cuda
    cuda.Stream = cuda.Event = Idle
    cuda.current_device = lambda: "cpu"
    cuda.current_stream = Idle
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.synchronize = cuda.set_device = cuda._lazy_init = lambda *args: None
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *args: torch.get_rng_state()
    random: Any = tensor_parallel.random
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    exchange = torch.distributed.all_to_all_single

    def exchange_with_lists(
        output: Any, tensor: Any, output_sizes: Any = None, sizes: Any = None, **kw: Any
    ) -> Any:
        output_sizes, sizes = kw.pop("output_split_sizes", output_sizes), kw.pop("input_split_sizes", sizes)
        as_list = [size.tolist() if torch.is_tensor(size) else size for size in (output_sizes, sizes)]
        return exchange(output, tensor, *as_list, **kw)

    torch.distributed.all_to_all_single = exchange_with_lists
    torch.compiler.set_stance("force_eager")
    CudaIsCpu().__enter__()


def build() -> tuple[Any, Any]:
    """Make the wrapped model and its optimizer."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    torch.manual_seed(1234)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    config = TransformerConfig(
        num_layers=NUM_LAYERS,
        hidden_size=HIDDEN_SIZE,
        num_attention_heads=NUM_HEADS,
        num_query_groups=NUM_QUERY_GROUPS,
        ffn_hidden_size=EXPERT_FFN_HIDDEN_SIZE,
        num_moe_experts=NUM_EXPERTS,
        moe_router_topk=TOP_K,
        moe_ffn_hidden_size=EXPERT_FFN_HIDDEN_SIZE,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
        moe_router_force_load_balancing=True,
        moe_router_dtype="fp32",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        deallocate_pipeline_outputs=True,
        finalize_model_grads_func=finalize_model_grads,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_decoder_block_spec(config, use_transformer_engine=False),
        vocab_size=VOCAB_SIZE,
        max_sequence_length=SEQ_LEN,
        position_embedding_type="rope",
    )
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    wrapped = DistributedDataParallel(config, ddp_config, model)
    optimizer_config = OptimizerConfig(optimizer="adam", lr=LEARNING_RATE, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(optimizer_config, [wrapped])
    config.grad_scale_func = optimizer.scale_loss
    return wrapped, optimizer


def forward_step(batches: Any, model: Any) -> Any:
    """Run one micro batch, and say how its loss is made."""
    samples = next(batches)
    positions = torch.arange(SEQ_LEN).unsqueeze(0)

    def loss_of(losses: torch.Tensor) -> Any:
        total = losses.float().sum()
        return total, torch.tensor(losses.numel(), dtype=torch.int), {"loss": total.detach() / losses.numel()}

    return model(samples[:, :-1], positions, None, labels=samples[:, 1:]), loss_of


def train(model: Any, optimizer: Any, num_steps: int) -> None:
    """Take steps on random tokens, looking at each loss as any loop does."""
    for _ in range(num_steps):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        batches = iter([torch.randint(VOCAB_SIZE, (1, SEQ_LEN + 1)) for _ in range(NUM_MICRO_BATCHES)])
        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=[model],
            num_microbatches=NUM_MICRO_BATCHES,
            seq_length=SEQ_LEN,
            micro_batch_size=1,
            forward_only=False,
        )
        optimizer.step()
        loss = sum(part["loss"] for part in losses) / NUM_MICRO_BATCHES
        if not torch.isfinite(loss):
            raise SystemExit("the minimal loop diverged")


def main() -> None:
    torch.set_num_threads(1)
    replace_cuda()
    model, optimizer = build()
    for line in sys.stdin:
        start_s = time.perf_counter()
        train(model, optimizer, int(line))
        print(time.perf_counter() - start_s, flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
