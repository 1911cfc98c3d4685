"""How a search divides layers over pipeline ranks and virtual stages: evenly, or by balanced layouts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from moe_bench.analysis.flops import forward_flops_by_part
from moe_bench.analysis.params import Part
from moe_bench.results.flops_convention import OUR_COUNTING
from moe_bench.spec.recipe import Recipe

VIRTUAL_STAGES = (1, 2, 3, 4, 6, 8, 12, 16)
"""Model chunks per pipeline rank that are tried, as long as every chunk but the last holds a layer."""


class Split(NamedTuple):
    """One way to cut the model into stages."""

    pipeline: int
    virtual_pipeline: int
    layout: str | None
    """None where every stage has equally many layers."""


def splits(recipe: Recipe, pipelines: Iterable[int]) -> tuple[Split, ...]:
    """Every way to cut the recipe's model over these pipeline sizes, for all `VIRTUAL_STAGES`.

    Embedding and loss count as no layer, as one each, or as their FLOPs weigh; so do prediction modules.
    That is how public layout strings come about: `Et|(tt|)*30mL` counts one each, `Et*4|(tttt|)*14tmL` none
    for the embedding and three for what follows the last decoder layer.
    """
    num_layers, num_mtp = recipe.model.num_layers, recipe.num_mtp_layers
    heavy = tail_slots(recipe)
    weights = dict.fromkeys([(0, 0), (1, 1 + num_mtp), (0, heavy), (1, heavy)])
    found: dict[Split, None] = {}
    for pipeline in pipelines:
        for virtual in VIRTUAL_STAGES if pipeline > 1 else (1,):
            for head, tail in weights:
                counts = balanced_counts(num_layers, pipeline * virtual, head_slots=head, tail_slots=tail)
                if counts is not None:
                    is_even = len(set(counts)) == 1
                    layout = None if is_even else layout_text(counts, num_mtp_layers=num_mtp)
                    found[Split(pipeline, virtual, layout)] = None
    return tuple(found)


def tail_slots(recipe: Recipe) -> int:
    """What stands behind the last decoder layer, in layers: FLOPs of loss and prediction modules over a mean
    layer's, rounded.
    """
    model = recipe.model

    def forward(num_mtp_layers: int) -> tuple[int, int]:
        parts = forward_flops_by_part(
            model,
            num_seqs=1,
            seq_len=recipe.seq_len,
            num_mtp_layers=num_mtp_layers,
            counting=OUR_COUNTING,
        )
        return sum(parts.values()), parts[Part.LM_HEAD]

    main, head = forward(0)
    whole, _ = forward(recipe.num_mtp_layers)
    layer = (main - head) / model.num_layers
    return round((whole - main + head) / layer)


def balanced_counts(
    num_layers: int, num_chunks: int, *, head_slots: int, tail_slots: int
) -> tuple[int, ...] | None:
    """Decoder layers of each chunk where the first also holds `head_slots` and the last `tail_slots`.

    Chunks differ by one slot at most, later ones being larger, since earlier ranks hold more micro batches. A
    tail that is longer than a chunk stands alone. None where a chunk before the last would have no layer.
    """
    if num_chunks > 1:
        slots = head_slots + num_layers + tail_slots
        if tail_slots > slots // num_chunks:
            before = balanced_counts(num_layers, num_chunks - 1, head_slots=head_slots, tail_slots=0)
            return None if before is None else (*before, 0)
        size, num_larger = divmod(slots, num_chunks)
        counts = [size + (index >= num_chunks - num_larger) for index in range(num_chunks)]
        counts[0] -= head_slots
        counts[-1] -= tail_slots
    else:
        counts = [num_layers]
    return tuple(counts) if min(counts[:-1], default=1) > 0 and counts[-1] >= 0 else None


def layout_text(counts: Sequence[int], *, num_mtp_layers: int) -> str:
    """Megatron-Core's layout string of these chunks, equal neighbours written once: `Et|(tt|)*30mL`."""
    first, *middle = (_letters(count) for count in counts[:-1])
    return "".join((f"E{first}|", *_runs(middle), _letters(counts[-1]), "m" * num_mtp_layers, "L"))


def _letters(count: int) -> str:
    return f"t*{count}" if count > 4 else "t" * count


def _runs(stages: Iterable[str]) -> Iterator[str]:
    for stage, group in groupby(stages):
        number = len(list(group))
        yield f"({stage}|)*{number}" if number > 1 else f"{stage}|"
