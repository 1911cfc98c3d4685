"""Random numbers for tokens that depend on which tokens they are: not on the layout, nor on what came before.

A number is keyed by the seed, the micro batch, the layer and the token's place in its sequence. So a run that
goes on from a checkpoint draws what it would have drawn, and no random state is saved.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

_MICRO_BATCH = "moe_bench-micro-batch"
"""Name in Megatron-Core's tracker of random states, of which recomputation restores every one: under a
pipeline the micro batch that is recomputed is not the one that was begun last."""


def begin_micro_batch(first_sample: Tensor) -> None:
    """Say which micro batch goes through the model next: its first sample's number, int64 [], on the host."""
    tracker = get_cuda_rng_tracker()
    tracker.set_states(tracker.get_states() | {_MICRO_BATCH: first_sample})


def token_draws(router: Any, seed: int, *, seq_len: int, num_sequences: int, device: torch.device) -> Tensor:
    """Uniform on [0, 1), one number for each token of the micro batch that `router` sees on this rank.

    float32 [sequence, micro batch], `seq_len` long: the rank's part of a sequence, which context ranks share
    in zigzag order and, under sequence parallelism, tensor ranks within that. KeyError where no micro batch
    was begun.
    """
    num_parts = router.tp_group.size() if router.config.sequence_parallel else 1
    shape = (num_sequences, seq_len * num_parts * router.cp_group.size())
    first_sample = int(get_cuda_rng_tracker().get_states()[_MICRO_BATCH])
    layer = f"{'mtp' if router.is_mtp_layer else 'decoder'}.{router.layer_number - 1}"
    draws = whole_draws(f"{seed}:{first_sample}:{layer}", shape, device=device)
    draws = get_batch_on_this_cp_rank({"draws": draws}, False, router.cp_group)["draws"].T
    return draws.chunk(num_parts)[router.tp_group.rank()] if num_parts > 1 else draws


def whole_draws(key: str, shape: tuple[int, int], *, device: torch.device) -> Tensor:
    """Of all tokens of a micro batch, float32 [micro batch, sequence]; GPUs draw other numbers than hosts."""
    if device.type == "meta":
        return torch.rand(shape, device=device)
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    # 63 bits: manual_seed takes signed numbers
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest) >> 1)
    return torch.rand(shape, device=device, generator=generator)
