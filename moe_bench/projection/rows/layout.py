"""A pipeline layout for a published row that prints stages but not how the layers were placed in them."""

from __future__ import annotations

from collections.abc import Mapping

from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.pipeline import LayoutError, pipeline_chunks

Split = Mapping[str, object]
"""Fields of `ParallelSpec` that say how layers are placed."""

EVEN: Split = {}
WITH_ENDS: Split = {"embedding_counts_as_layer": True, "loss_counts_as_layer": True}


def even_split(num_layers: int, num_mtp_layers: int, pipeline: int, virtual_pipeline: int) -> Split | None:
    """The split that needs no layout string: even, or even with embedding and loss counted as layers.

    None where the layers do not divide either way, or where an MTP layer has to be placed.
    """
    for split in (EVEN, WITH_ENDS) if num_mtp_layers == 0 or pipeline == 1 else ():
        if _exists(split, num_layers, num_mtp_layers, pipeline, virtual_pipeline):
            return split
    return EVEN if pipeline == 1 else None


def balanced_layout(num_layers: int, num_mtp_layers: int, num_stages: int) -> str:
    """A layout string with embedding, decoder, MTP layers and loss in stages as equal as they can be.

    Each item counts as one slot but the embedding, which computes nothing; every stage takes
    ceil((layers + MTP + loss + embedding) / stages) decoder layers, and the last one what is left. This gives
    the strings of Megatron-Bridge for DeepSeek-V3 and Kimi-K2 (`Et|(tt|)*30mL`, `Et*4|(tttt|)*14tmL`), and
    takes layers from the first stages where those counts exceed the model.
    """
    per_stage = -(-(num_layers + num_mtp_layers + 2) // num_stages)
    counts = [per_stage] * (num_stages - 1)
    last = num_layers - sum(counts)
    index = 0
    while last < 0:
        counts[index] -= 1
        last += 1
        index = (index + 1) % len(counts)
    stages = ["t" * count for count in (*counts, last)]
    stages[0] = "E" + stages[0]
    stages[-1] += "m" * num_mtp_layers + "L"
    return "|".join(stages)


def _exists(split: Split, num_layers: int, num_mtp_layers: int, pipeline: int, virtual_pipeline: int) -> bool:
    parallel = ParallelSpec(
        num_gpus=pipeline,
        pipeline=pipeline,
        virtual_pipeline=virtual_pipeline,
        embedding_counts_as_layer="embedding_counts_as_layer" in split,
        loss_counts_as_layer="loss_counts_as_layer" in split,
    )
    try:
        pipeline_chunks(parallel, num_layers=num_layers, num_mtp_layers=num_mtp_layers)
    except LayoutError:
        return False
    return True
