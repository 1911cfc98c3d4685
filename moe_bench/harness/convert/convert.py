"""Both directions of the conversion, each behind one function that refuses before it begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from moe_bench.checkpoints.config import Config
from moe_bench.checkpoints.rule import Rule
from moe_bench.harness.convert.intact import require_intact
from moe_bench.harness.convert.to_huggingface import MegatronReader, convert_to_huggingface
from moe_bench.harness.convert.to_megatron import convert_to_megatron

__all__ = ["convert_to_megatron", "to_huggingface"]


def to_huggingface(
    rules: Sequence[Rule],
    source: Path,
    target: Path,
    *,
    config: Config,
    max_shard_bytes: int,
    on_tensor: Callable[[Rule], None],
) -> None:
    """Write the Hugging Face checkpoint `target` of the distributed checkpoint `source`.

    `on_tensor` is called after each rule. Raises BadInputError, naming the tensor, where the two do not match
    or something cannot be read; MissingRequirementError where the disk is full.
    """
    reader = MegatronReader(source)
    reader.require_match(rules)
    require_intact(source)
    convert_to_huggingface(
        rules, reader, target, config=config, max_shard_bytes=max_shard_bytes, on_tensor=on_tensor
    )
