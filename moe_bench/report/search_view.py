"""What `search` prints: the space, what became of its layouts, the fastest, why, and memory against speed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from moe_bench.analysis.memory_verdict import verdict
from moe_bench.projection.forecast import UNCOUNTED_OFFLOAD, has_uncounted_offload
from moe_bench.projection.search.base import Base
from moe_bench.projection.search.layout import Context, Sharding
from moe_bench.projection.search.record import Record
from moe_bench.projection.search.search import Found, SearchResult
from moe_bench.projection.search.space import Space
from moe_bench.report.columns import Columns
from moe_bench.report.figures import GIB, rate_text, seconds_text, tflops_text
from moe_bench.report.project_view import NOT_MEASURED
from moe_bench.report.recipe_list import layout_label
from moe_bench.results.flops_convention import OUR_COUNTING
from moe_bench.spec.recipe import Recompute

_NUM_TERMS = 4
_NUM_RULES = 3


def search_view(result: SearchResult, base: Base, record: Record, paths: Sequence[Path]) -> RenderableType:
    """A whole search, for people."""
    recipe = base.recipe
    gpus = f"{recipe.parallel.num_gpus:,} GPUs of {recipe.system.display_name}"
    job = f"{recipe.precision}, {recipe.seq_len:,} tokens per sequence, {recipe.global_batch_size:,} per step"
    parts: list[RenderableType] = [
        Text(f"{recipe.model.display_name} on {gpus}: {job}", style="bold"),
        Text("; ".join(base.notes), style="dim"),
        Text(NOT_MEASURED, style="yellow"),
        *([Text(UNCOUNTED_OFFLOAD, style="yellow")] if has_uncounted_offload(recipe) else []),
        Text(),
        *(Text(f"{name}: {values}", style="dim") for name, values in space_rows(result.space)),
        Text(),
        Text(counts_text(result)),
        Text(f"refused most often: {rules_text(result)}", style="dim"),
        Text(),
    ]
    if result.ranked:
        parts += [_table(result.ranked, "fastest that fit"), Text(why_text(result.ranked))]
        parts += [Text(line, style="yellow") for line in beyond_lines(result.ranked, record)]
    else:
        parts.append(Text("nothing fits with margins for fragmentation, context and NCCL", style="yellow"))
    if result.close:
        parts += [Text(), _table(result.close, "faster, but too close to say whether they fit")]
    if result.front:
        parts += [Text(), _front_table(result)]
    if paths:
        parts += [Text(), *(Text(f"written: {path}") for path in paths)]
    return Group(*parts)


def beyond_lines(ranked: Sequence[Found], record: Record) -> Iterator[str]:
    """Where the shown layouts leave what was published, each statement once."""
    beyond = dict.fromkeys(text for one in ranked for text in record.beyond(one.recipe))
    if beyond:
        yield (
            f"beyond the record: {'; '.join(beyond)}; there the projection extrapolates, and --set holds a "
            "layout to what has been run"
        )


def search_json(result: SearchResult, base: Base, record: Record, paths: Sequence[Path]) -> dict[str, object]:
    """The same for machines, with the units in the names."""
    recipe = base.recipe
    return {
        "model": recipe.model.key,
        "system": recipe.system.key,
        "num_gpus": recipe.parallel.num_gpus,
        "precision": recipe.precision,
        "seq_len": recipe.seq_len,
        "global_batch_size": recipe.global_batch_size,
        "base": list(base.notes),
        "space": dict(space_rows(result.space)),
        "num_generated": result.num_generated,
        "num_legal": result.num_legal,
        "refused": dict(result.refused.most_common()),
        "num_over_memory_bound": result.num_over,
        "num_slower_by_bound": result.num_slower,
        "num_fitting": result.num_fitting,
        "num_too_close_to_say": result.num_too_close,
        "num_not_fitting": result.num_not_fitting,
        "num_simulated": result.num_simulated,
        "flops_counting": OUR_COUNTING,
        "ranked": [
            {
                **_found_json(found),
                "num_variants": found.num_variants,
                "beyond_record": list(record.beyond(found.recipe)),
            }
            for found in result.ranked
        ],
        "why": why_text(result.ranked) if result.ranked else None,
        "too_close_to_say": [_found_json(found) for found in result.close],
        "pareto": [{"memory_fraction": share, **_found_json(found)} for share, found in result.front],
        "written": [str(path) for path in paths],
    }


def counts_text(result: SearchResult) -> str:
    """What became of all layouts, in one line."""
    return (
        f"{result.num_generated:,} layouts generated, {result.num_legal:,} legal; of these "
        f"{result.num_over:,} exceed the memory by its lower bound, and {result.num_slower:,} cannot be "
        f"among the fastest by the lower bound of time; of the rest {result.num_fitting:,} fit, "
        f"{result.num_too_close:,} are too close to say, {result.num_not_fitting:,} do not fit; "
        f"{result.num_simulated:,} were simulated"
    )


def rules_text(result: SearchResult) -> str:
    """The rules that refuse most layouts; every illegal layout counts for the first that it breaks."""
    most = result.refused.most_common(_NUM_RULES)
    return ", ".join(f"{name} ({number:,})" for name, number in most) or "none"


def why_text(ranked: Sequence[Found]) -> str:
    """Where the first gains and loses most against the second, in one line."""
    if len(ranked) < 2:
        return "there is no second one to compare the first with"
    first, second = ({term.name: term.seconds for term in one.projection.terms} for one in ranked[:2])
    changes = {name: first.get(name, 0.0) - second.get(name, 0.0) for name in {**first, **second}}
    largest = sorted(changes.items(), key=lambda item: -abs(item[1]))[:_NUM_TERMS]
    words = [
        f"{seconds_text(abs(seconds))} {'less' if seconds < 0 else 'more'} {name}"
        for name, seconds in largest
        if seconds
    ]
    gained_s = ranked[1].projection.step_s - ranked[0].projection.step_s
    return f"why the first beats the second by {seconds_text(gained_s)}: {', '.join(words)}"


def space_rows(space: Space) -> Iterator[tuple[str, str]]:
    """Every axis and its values."""
    yield "TP", _joined(dict.fromkeys(str(one.tensor) for one in space.widths))
    yield "ETP", _joined(dict.fromkeys(str(one.expert_tensor) for one in space.widths))
    yield "CP", _joined(context_text(one) for one in space.contexts)
    yield "EP", _joined(map(str, space.experts))
    yield "micro batch", _joined(map(str, space.micro_batch_sizes))
    sizes = dict.fromkeys((split.pipeline, split.virtual_pipeline) for split in space.splits)
    yield (
        "PP x VPP",
        (
            _joined(f"{pipeline} x {virtual}" for pipeline, virtual in sizes)
            + f"; divisions of the layers: {len(space.splits)}"
        ),
    )
    yield "dispatcher", _joined(space.dispatchers)
    yield "EP overlap", _joined("on" if one else "off" for one in space.overlaps)
    yield "recompute", _joined(map(recompute_text, space.recomputes))
    yield "sharding", _joined(map(sharding_text, space.shardings))


def context_text(context: Context) -> str:
    """`1`, or the ranks and what they send: `4 p2p`."""
    return f"{context.size} {context.comm}" if context.size > 1 else "1"


def sharding_text(sharding: Sharding) -> str:
    """What data-parallel ranks divide: `optimizer`, `FSDP`, or of Megatron-FSDP what else than everything."""
    if sharding.is_fsdp:
        text = "FSDP" if sharding.divides_weights else f"FSDP {sharding.fsdp_strategy}"
    else:
        text = "optimizer" if sharding.data_sharding == "distributed_optimizer" else "none"
    return f"{text} x{sharding.num_instances}" if sharding.num_instances > 1 else text


def recompute_text(recompute: Recompute) -> str:
    """`none`, `full`, or the modules."""
    return "+".join(recompute.modules) or recompute.granularity


def _table(found: Sequence[Found], title: str) -> RenderableType:
    heading = ("tokens/s/GPU", "TFLOPs/GPU", "MFU", "step", "peak GiB")
    return Columns(
        headings=(
            title,
            *heading,
            "MBS",
            "sharding",
            "CP",
            "dispatcher",
            "EP overlap",
            "recompute",
            "variants",
            "layers",
        ),
        rows=tuple(
            (
                layout_label(one.recipe) or "one GPU per replica",
                *_figures(one),
                str(one.layout.micro_batch_size),
                sharding_text(one.layout.sharding),
                one.layout.context.comm if one.layout.context.size > 1 else "-",
                " or ".join((one.layout.dispatcher, *one.like)) if one.recipe.model.moe is not None else "-",
                "on" if one.layout.overlaps_experts else "off",
                recompute_text(one.layout.recompute),
                f"+{one.num_variants}" if one.num_variants else "-",
                one.layout.split.layout or "even",
            )
            for one in found
        ),
        right=frozenset((*heading, "MBS", "variants")),
        is_stacked=True,
    )


def _figures(one: Found) -> tuple[str, ...]:
    projection = one.projection
    return (
        rate_text(projection.tokens_per_s_per_gpu),
        tflops_text(projection.flops_per_s_per_gpu),
        f"{projection.mfu_fraction:.1%}",
        seconds_text(projection.step_s),
        f"{one.peak_bytes / GIB:.1f}",
    )


def _front_table(result: SearchResult) -> RenderableType:
    usable = result.front[0][1].memory.usable_bytes / GIB
    heading = ("tokens/s/GPU", "TFLOPs/GPU", "MFU", "step", "peak GiB")
    return Columns(
        headings=("memory against speed: at most", *heading, "MBS", "recompute", "layout"),
        rows=tuple(
            (
                f"{share:.0%} of {usable:.1f} GiB",
                *_figures(one),
                str(one.layout.micro_batch_size),
                recompute_text(one.layout.recompute),
                layout_label(one.recipe),
            )
            for share, one in result.front
        ),
        right=frozenset((*heading, "MBS")),
    )


def _found_json(one: Found) -> dict[str, object]:
    projection, layout = one.projection, one.layout
    return {
        "tokens_per_s_per_gpu": projection.tokens_per_s_per_gpu,
        "flops_per_s_per_gpu": projection.flops_per_s_per_gpu,
        "mfu_fraction": projection.mfu_fraction,
        "step_s": projection.step_s,
        "terms": {term.name: term.seconds for term in projection.terms},
        "memory": {
            "verdict": verdict(one.memory),
            "peak_bytes": one.peak_bytes,
            "usable_bytes": one.memory.usable_bytes,
        },
        "layout": {
            **{
                name: getattr(one.recipe.parallel, name)
                for name in (
                    "tensor", "expert_tensor", "context", "context_comm", "expert", "pipeline",
                    "virtual_pipeline", "layout", "data", "data_sharding", "fsdp_strategy",
                    "num_optimizer_instances",
                )
            },
            "micro_batch_size": layout.micro_batch_size,
            "dispatcher": layout.dispatcher,
            "projected_alike": list(one.like),
            "expert_overlap": layout.overlaps_experts,
            "recompute": layout.recompute.model_dump(mode="json"),
        },
    }  # fmt: skip


def _joined(words: Iterable[str]) -> str:
    return ", ".join(words)
