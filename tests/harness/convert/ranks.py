"""What a rank does with a converted checkpoint; apart from the tests, so that a rank imports little."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state

from moe_bench.checkpoints.rule import Rule
from moe_bench.checkpoints.safetensors_folder import logical_tensors
from moe_bench.harness.build import model_chunks, transformer_config
from moe_bench.harness.convert.convert import convert_to_megatron
from moe_bench.harness.convert.rearrange import global_tensors
from moe_bench.harness.convert.stored import tensor_reader
from moe_bench.harness.mcore_config import megatron_arguments
from moe_bench.harness.process_groups import process_groups
from moe_bench.harness.rank import machine
from moe_bench.harness.settings import settings_of
from moe_bench.harness.weights import local_part, sharded_tensors
from moe_bench.harness.workers import Seat
from tests.harness.convert.checkpoints import rules_of, toy_of


def rank_loads(key: str, folder: Path, saved: Path, seat: Seat) -> int:
    """Load `folder` into the real model, compare every part with the map, save it anew; parts compared."""
    recipe = toy_of(key, "TP2 x EP2")
    arguments = megatron_arguments(recipe)
    settings = settings_of(arguments)
    with (
        machine(settings, seat.rendezvous) as (device, _),
        process_groups(
            seat.rendezvous, backend="gloo", sizes=arguments.parallel_state, listen_fd=seat.listen_fd
        ),
    ):
        (chunk,) = model_chunks(arguments, settings, transformer_config(arguments), device=device)
        metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        wanted = {"model": chunk.sharded_state_dict(metadata=metadata)}
        state = dist_checkpointing.load(wanted, str(folder / "ours"), verify_integrity=True)
        chunk.load_state_dict(state["model"], strict=True)
        with tensor_reader(logical_tensors(folder / "theirs")) as reader:
            makers = global_tensors(rules_of(recipe), reader.read)
            shards = list(sharded_tensors(chunk))
            assert makers.keys() == {shard.key for shard in shards}
            for shard in shards:
                part = local_part(shard, makers[shard.key]())
                assert torch.equal(shard.data, part.to(shard.data.dtype)), shard.key
        for parameter in chunk.parameters():
            parameter.data = parameter.data.bfloat16()
        dist_checkpointing.save({"model": chunk.sharded_state_dict(metadata=metadata)}, str(saved))
        return len(shards)


def killed_in_the_middle(key: str, folder: Path, seat: Seat) -> None:
    """Kills itself before the last of the tensors is written."""
    rules = rules_of(toy_of(key))
    seen: list[Rule] = []

    def on_tensor(rule: Rule) -> None:
        seen.append(rule)
        if len(seen) == len(rules) - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    convert_to_megatron(rules, logical_tensors(folder / "theirs"), folder / "ours", on_tensor=on_tensor)
