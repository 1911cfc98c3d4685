"""Small GPT models from our layer specs, and their gradients as Megatron-Core finalises them."""

from typing import Any

import torch

from moe_bench.harness.kernels.layer_spec import decoder_block_spec, mtp_block_spec
from moe_bench.harness.kernels.provider import KernelChoice
from tests.harness.kernels.configs import small_config
from tests.harness.kernels.ranks import Groups

NATIVE = KernelChoice(family="torch_native", device_type="cpu")
VOCABULARY = 64
NUM_TOKENS = 16


def model(config: Any, choice: KernelChoice, groups: Groups) -> Any:
    """A GPT model of one stage, float32, with its head."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    return GPTModel(
        config=config,
        transformer_layer_spec=decoder_block_spec(config, choice),
        vocab_size=VOCABULARY,
        max_sequence_length=NUM_TOKENS,
        position_embedding_type="none" if config.multi_latent_attention else "rope",
        mtp_block_spec=mtp_block_spec(config, choice) if config.mtp_num_layers else None,
        pg_collection=groups,
    )


def loss_of(built: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (1, NUM_TOKENS + 1), generator=generator)
    positions = torch.arange(NUM_TOKENS)[None]
    return built(
        tokens[:, :-1], positions, None, labels=tokens[:, 1:], loss_mask=torch.ones(1, NUM_TOKENS)
    ).mean()


def replicated_gradients(
    groups: Groups, changes: dict[str, Any], choice: KernelChoice
) -> dict[str, torch.Tensor]:
    """Gradients as finalize_model_grads leaves them, of parameters that tensor parallelism does not cut."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    size = groups.tp.size()
    config = small_config(
        tensor_model_parallel_size=size,
        sequence_parallel=size > 1,
        expert_tensor_parallel_size=1,
        moe_layer_freq=[0, 0, 0, 0],
        **changes,
    )
    torch.manual_seed(3)
    built = model(config, choice, groups)
    for name, parameter in built.named_parameters():
        if "layernorm" in name:
            generator = torch.Generator().manual_seed(len(name))
            parameter.data = torch.rand(parameter.shape, generator=generator) + 0.5
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), built)
    wrapped.zero_grad_buffer()
    loss_of(wrapped).backward()
    finalize_model_grads([wrapped])
    return {
        name: parameter.main_grad.clone()
        for name, parameter in built.named_parameters()
        if not getattr(parameter, "tensor_model_parallel", False)
    }
