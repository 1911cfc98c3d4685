"""Which layers stand on which pipeline rank and chunk, for layout strings and for even splits."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moe_bench.spec.parallel import ParallelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One model chunk: the part of the model that one virtual stage of one pipeline rank holds."""

    pipeline_rank: int
    virtual_stage: int
    layers: tuple[int, ...]
    """Decoder layers, counted from 0."""
    has_embedding: bool
    has_loss: bool
    num_mtp_layers: int


class LayoutError(ValueError):
    """A layout that cannot exist; the message says why and what would."""


class StageCountError(LayoutError):
    """A layout string with more or fewer stages than the pipeline has."""

    def __init__(self, num_stages: int, parallel: ParallelSpec) -> None:
        fix = f"write {parallel.num_chunks} stages"
        if num_stages % parallel.pipeline == 0:
            fix += f", or virtual_pipeline: {num_stages // parallel.pipeline}"
        have = f"PP{parallel.pipeline} x {parallel.virtual_pipeline} virtual stages"
        super().__init__(f"{num_stages} stages, {have}; {fix}")


def expand_layout(text: str) -> tuple[str, ...]:
    """The stages of a Megatron-Core layout string, one string of the letters E, t, m, L per stage.

    `x*3` repeats one letter, `(..)*3` repeats a group, `|` ends a stage, commas and blanks are ignored
    (Megatron-Core's PipelineParallelLayerLayout.parse_str_to_list).
    """
    flat = re.sub(r"[,\s]", "", text)
    for repeated in (r"\(([^()]*)\)\*(\d+)", r"(.)\*(\d+)"):
        flat = re.sub(repeated, lambda match: match.group(1) * int(match.group(2)), flat)
    unknown = sorted(set(flat) - set("EtmL|"))
    if unknown:
        raise LayoutError(f"unknown layout letters {' '.join(unknown)}; use E, t, m, L, |, (..)*n and x*n")
    return tuple(flat.split("|"))


def pipeline_chunks(parallel: ParallelSpec, *, num_layers: int, num_mtp_layers: int) -> tuple[Chunk, ...]:
    """All chunks in the order in which a token passes them; chunk i stands on pipeline rank i modulo PP.

    Raises LayoutError where no such split exists.
    """
    if parallel.layout is not None:
        stages = expand_layout(parallel.layout)
        _require_layout(stages, parallel, num_layers=num_layers, num_mtp_layers=num_mtp_layers)
    else:
        stages = _even_stages(parallel, num_layers=num_layers, num_mtp_layers=num_mtp_layers)
    chunks = []
    first_layer = 0
    for index, stage in enumerate(stages):
        num_here = stage.count("t")
        chunks.append(
            Chunk(
                pipeline_rank=index % parallel.pipeline,
                virtual_stage=index // parallel.pipeline,
                layers=tuple(range(first_layer, first_layer + num_here)),
                has_embedding="E" in stage,
                has_loss="L" in stage,
                num_mtp_layers=stage.count("m"),
            )
        )
        first_layer += num_here
    return tuple(chunks)


def embedding_pipeline_ranks(
    parallel: ParallelSpec, *, num_mtp_layers: int, is_tied: bool
) -> tuple[int, ...]:
    """Pipeline ranks with a copy of the input embedding: the first, those of MTP, and the loss's if tied."""
    if parallel.layout is None:
        is_on_last = is_tied or num_mtp_layers > 0
        return tuple(sorted({0, parallel.pipeline - 1} if is_on_last else {0}))
    letters = "EmL" if is_tied else "Em"
    stages = expand_layout(parallel.layout)
    return tuple(
        sorted({index % parallel.pipeline for index, stage in enumerate(stages) if set(stage) & set(letters)})
    )


def _require_layout(
    stages: tuple[str, ...], parallel: ParallelSpec, *, num_layers: int, num_mtp_layers: int
) -> None:
    letters = "".join(stages)
    for letter, what, wanted in (
        ("E", "embedding", 1),
        ("t", "decoder layer", num_layers),
        ("m", "MTP layer", num_mtp_layers),
        ("L", "loss", 1),
    ):
        if letters.count(letter) != wanted:
            found = letters.count(letter)
            raise LayoutError(f"{found} {what} letters {letter!r}, the model has {wanted}; change the layout")
    if not stages[0].startswith("E") or not stages[-1].endswith("L"):
        raise LayoutError("the first stage must begin with E and the last end with L; move the letter")
    if len(stages) != parallel.num_chunks:
        raise StageCountError(len(stages), parallel)


def _even_stages(parallel: ParallelSpec, *, num_layers: int, num_mtp_layers: int) -> tuple[str, ...]:
    counts = _even_counts(parallel, num_layers=num_layers)
    stages = ["t" * count for count in counts]
    stages[0] = "E" + stages[0]
    stages[-1] += "m" * num_mtp_layers + "L"
    return tuple(stages)


def _even_counts(parallel: ParallelSpec, *, num_layers: int) -> list[int]:
    """Decoder layers per chunk, as Megatron-Core's get_num_layers_to_build splits them."""
    first, last = parallel.num_layers_first_stage, parallel.num_layers_last_stage
    if first or last:
        return _uneven_counts(parallel, num_layers=num_layers)
    slots = num_layers + parallel.embedding_counts_as_layer + parallel.loss_counts_as_layer
    if slots % parallel.num_chunks:
        raise LayoutError(
            f"{num_layers} layers ({slots} slots with embedding and loss) do not divide into "
            f"{parallel.num_chunks} chunks; state a layout, or first and last stage"
        )
    counts = [slots // parallel.num_chunks] * parallel.num_chunks
    counts[0] -= parallel.embedding_counts_as_layer
    counts[-1] -= parallel.loss_counts_as_layer
    return counts


def _uneven_counts(parallel: ParallelSpec, *, num_layers: int) -> list[int]:
    first, last = parallel.num_layers_first_stage, parallel.num_layers_last_stage
    num_middle_ranks = parallel.pipeline - bool(first) - bool(last)
    middle = num_layers - first - last
    if middle < 0 or (num_middle_ranks == 0 and middle) or (num_middle_ranks and middle % num_middle_ranks):
        raise LayoutError(
            f"{num_layers} layers less {first} first and {last} last leave {middle} for "
            f"{num_middle_ranks} pipeline ranks; choose counts that divide"
        )
    per_rank = [middle // num_middle_ranks if num_middle_ranks else 0] * parallel.pipeline
    if first:
        per_rank[0] = first
    if last:
        per_rank[-1] = last
    if any(count % parallel.virtual_pipeline for count in per_rank):
        raise LayoutError(
            f"layers per pipeline rank {per_rank} do not divide by virtual_pipeline = "
            f"{parallel.virtual_pipeline}; choose counts that divide"
        )
    return [count // parallel.virtual_pipeline for count in per_rank] * parallel.virtual_pipeline
