"""The verb that looks for the fastest layout that fits: search."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_bench.cli.app import PREDICT, app
from moe_bench.cli.files import folder_to_write
from moe_bench.cli.options import JsonOption, SetOption, make_loader, print_view, whole_numbers
from moe_bench.spec.catalogue import data_root

if TYPE_CHECKING:
    from moe_bench.projection.search.base import Asked
    from moe_bench.projection.search.search import Found

_NUM_SHOWN = 10


@app.command(rich_help_panel=PREDICT)
def search(
    model: Annotated[str, typer.Argument(help="A model of `moe-bench list`, or a reference model.")],
    system: Annotated[str, typer.Option("--system", help="h100_sxm, gb200_nvl72, ...")],
    num_gpus: Annotated[int, typer.Option("--num-gpus", min=1, help="GPUs of the job.")],
    global_batch: Annotated[
        int | None,
        typer.Option(
            "--global-batch", min=1, help="Sequences per step; default: the recipe's tokens per GPU."
        ),
    ] = None,
    seq_len: Annotated[int | None, typer.Option("--seq-len", min=1, help="Default: the recipe's.")] = None,
    precision: Annotated[str | None, typer.Option("--precision", help="bf16, fp8_blockwise, ...")] = None,
    micro_batch: Annotated[
        str, typer.Option("--micro-batch", metavar="N,N,...", help="Micro batch sizes to try.")
    ] = "1,2,4",
    top: Annotated[int, typer.Option("--top", min=1, help="How many of the fastest to print.")] = _NUM_SHOWN,
    write: Annotated[
        Path | None,
        typer.Option(
            "--write",
            metavar="DIR",
            callback=folder_to_write,
            help="Write the fastest as recipe files below DIR.",
        ),
    ] = None,
    changes: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the fastest layouts that fit, out of all legal ones.

    Searched: TP, ETP, CP and what its ranks send, PP, VPP and the division of
    the layers, EP, dispatcher, expert overlap, micro batch, recomputation, and
    sharding by the distributed optimizer or by Megatron-FSDP. Sequence
    parallelism, overlapped transfers and environment follow. All else is the
    recipe's and changed by --set: precision, fusions, CUDA graphs, and
    offloading, whose transfers the projection does not count.
    """
    from moe_bench.projection.search.base import Asked, search_base
    from moe_bench.projection.search.record import record_of
    from moe_bench.projection.search.search import search as search_layouts
    from moe_bench.projection.search.space import search_space
    from moe_bench.report.search_view import search_json, search_view
    from moe_bench.results.published import load_rows

    asked = Asked(
        model=model,
        system=system,
        num_gpus=num_gpus,
        precision=precision,
        seq_len=seq_len,
        global_batch_size=global_batch,
        changes=tuple(changes or ()),
    )
    base = search_base(asked, make_loader())
    micro_batch_sizes = dict.fromkeys(whole_numbers(micro_batch, option="--micro-batch", example="1,2,4"))
    space = search_space(base.recipe, micro_batch_sizes=tuple(micro_batch_sizes), pinned=asked.pinned)
    result = search_layouts(space, num_wanted=top)
    paths = () if write is None else _written(result.ranked, write, base.notes, _command(asked, micro_batch))
    record = record_of(base.recipe, load_rows(data_root() / "results" / "published"))
    print_view(search_view(result, base, record, paths), search_json(result, base, record, paths), as_json)


def _written(
    ranked: tuple[Found, ...], folder: Path, notes: tuple[str, ...], command: str
) -> tuple[Path, ...]:
    """The files, each of which reads back as a legal recipe."""
    from moe_bench.projection.search.recipes import comment, named
    from moe_bench.spec.write import write_recipe

    loader = make_loader()
    paths = []
    for found in ranked:
        recipe = named(found.recipe, found.layout)
        path = write_recipe(recipe, folder, comment=comment(command, notes), loader=loader)
        loader.recipe(path)
        paths.append(path)
    return tuple(paths)


def _command(asked: Asked, micro_batch: str) -> str:
    """What the user typed, but for what does not change the recipes."""
    options = {
        "--system": asked.system,
        "--num-gpus": asked.num_gpus,
        "--global-batch": asked.global_batch_size,
        "--seq-len": asked.seq_len,
        "--precision": asked.precision,
        "--micro-batch": micro_batch,
    }
    words = ["moe-bench", "search", asked.model]
    for name, value in options.items():
        words += [name, str(value)] if value is not None else []
    for change in asked.changes:
        words += ["--set", change]
    return shlex.join(words)
