"""Verbs that read results and published numbers: published, reproduce, compare, gate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moe_bench.cli.app import READ, app
from moe_bench.cli.files import any_file_to_write
from moe_bench.cli.options import JsonOption, make_loader, print_view, record_places, require_one_output
from moe_bench.errors import BadInputError, GateError
from moe_bench.spec.catalogue import data_root, find_recipe, recipe_model_keys, recipe_paths

if TYPE_CHECKING:
    from moe_bench.report.compare import Compared

VaryOption = Annotated[
    list[str] | None,
    typer.Option(
        "--vary", metavar="FIELD", help="Field that is under test and may differ, such as dispatcher."
    ),
]
BAND = 0.05
"""That of a claim (analysis/equivalence.py), which imports scipy."""
BandOption = Annotated[
    float,
    typer.Option("--within", min=0, max=1, help="Fraction within which two throughputs count as the same."),
]


@app.command(rich_help_panel=READ)
def published(
    model: Annotated[
        str | None, typer.Option("--model", help="Model, as printed or as a folder of recipes/.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="h100_sxm, H100, GB200, ...")] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="bf16, fp8_blockwise, MXFP8, ...")
    ] = None,
    num_gpus: Annotated[int | None, typer.Option("--num-gpus", min=1)] = None,
    trust: Annotated[
        Literal["A", "B", "C"] | None, typer.Option("--trust", help="Worst grade of trust wanted.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--kind", help="Kind of row, or `all`; default: training runs.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Find rows that contradict themselves.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List what others published: tokens/s/GPU, and TFLOPs/GPU in one convention."""
    from moe_bench.report import published as view
    from moe_bench.results.contradictions import contradictions, load_known
    from moe_bench.results.published import load_rows
    from moe_bench.results.selection import Selection, selected

    require_one_output(check=check, csv=as_csv)
    require_one_output(csv=as_csv, json=as_json)
    loader = make_loader()
    folder = data_root() / "results" / "published"
    keys = recipe_model_keys(loader.root)
    rows = load_rows(folder)
    if check:
        templates = {key: loader.recipe(find_recipe(key, loader)) for key in keys}
        found = contradictions(rows, templates, load_known(folder / "known" / "contradictions.yaml"))
        print_view(view.check_view(found, num_rows=len(rows)), view.check_json(found), as_json)
        raise typer.Exit(BadInputError.exit_code if any(one.known is None for one in found) else 0)
    asked = Selection(
        model=model, system=system, precision=precision, num_gpus=num_gpus, trust=trust, kind=kind
    )
    lines = view.published_lines(selected(rows, asked), {key: loader.model(key) for key in keys})
    if as_csv:
        typer.echo(view.as_csv(lines), nl=False)
    else:
        print_view(view.published_view(lines), list(lines), as_json)


@app.command(rich_help_panel=READ)
def reproduce(
    recipes: Annotated[
        list[str] | None,
        typer.Argument(help="Recipes, or models for all of their recipes; default: every recipe."),
    ] = None,
    results: Annotated[
        list[Path] | None, typer.Option("--results", help="Records or folders of them; default: results/.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Put our runs beside the published rows: ratio, 95 % interval, verdict."""
    from moe_bench.cli.listening import listening
    from moe_bench.report.projected_throughput import projected_throughput
    from moe_bench.report.reproduce import reproductions
    from moe_bench.report.reproduce_view import reproduce_json, reproduce_view
    from moe_bench.results.published import rows_by_id
    from moe_bench.results.reading import read_summaries

    loader = make_loader()
    paths = list(recipe_paths(loader.root))
    if recipes:
        of_models = [path for path in paths if path.parent.name in recipes]
        named = [find_recipe(name, loader) for name in recipes]
        paths = list(dict.fromkeys([path for path in named if path.parent.name not in recipes] + of_models))
    asked = [loader.recipe(path) for path in paths]
    without = [recipe.name for recipe in asked if recipe.reproduces is None]
    if recipes and len(without) == len(asked):
        raise BadInputError(
            f"{', '.join(without)}: copies no published row, so there is nothing to reproduce"
        )
    copies = {recipe.name: recipe for recipe in asked if recipe.reproduces is not None}
    rows = rows_by_id(data_root() / "results" / "published", {str(one.reproduces) for one in copies.values()})
    with listening() as listener:
        places = record_places(results)
        runs = tuple(read_summaries(places, listener, wanted=lambda entry: entry.recipe in copies))
    found = reproductions(asked, rows, runs, projected=projected_throughput(copies.values()))
    print_view(reproduce_view(found), reproduce_json(found), as_json)


@app.command(rich_help_panel=READ)
def compare(
    base: Annotated[Path, typer.Argument(help="A record or a folder of them.")],
    new: Annotated[
        Path | None,
        typer.Argument(help="A record or a folder of them; default: the runs of BASE that differ in --vary."),
    ] = None,
    vary: VaryOption = None,
    within: BandOption = BAND,
    as_json: JsonOption = False,
) -> None:
    """Give the ratio of two like sets of runs; unlike ones are refused with what differs."""
    from moe_bench.report.compare import compared_json, compared_view

    compared = _compared(base, new, vary=vary, within=within)
    print_view(compared_view(compared), compared_json(compared), as_json)


@app.command(rich_help_panel=READ)
def gate(
    baseline: Annotated[Path, typer.Argument(help="A record or a folder of them.")],
    new: Annotated[Path, typer.Argument(help="A record or a folder of them.")],
    vary: VaryOption = None,
    within: BandOption = BAND,
    junit: Annotated[
        Path | None, typer.Option("--junit", callback=any_file_to_write, help="Write JUnit XML here.")
    ] = None,
    summary: Annotated[
        Path | None,
        typer.Option("--summary", callback=any_file_to_write, help="Append a Markdown table to this file."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fail, with exit code 5, unless NEW is shown to be as fast as BASELINE, no slower and no faster."""
    from moe_bench.report import gate as view
    from moe_bench.report.compare import compared_json, compared_view

    compared = _compared(baseline, new, vary=vary, within=within)
    cases = view.gate_cases(compared)
    if junit is not None:
        junit.write_text(view.junit_xml(cases), encoding="utf-8")
    if summary is not None:
        with summary.open("a", encoding="utf-8") as file:
            file.write(view.markdown_summary(cases, band_fraction=within))
    print_view(compared_view(compared), compared_json(compared), as_json)
    line = view.gate_line(cases, band_fraction=within)
    if any(case.failure is not None for case in cases):
        raise GateError(line)
    typer.echo(line, err=True)


def _compared(base: Path, new: Path | None, *, vary: list[str] | None, within: float) -> Compared:
    from moe_bench.cli.listening import listening
    from moe_bench.report.compare import compare, compare_within
    from moe_bench.results.reading import read_summaries, refuse

    # a verdict on less than what is there would be on something else: nothing is skipped
    with listening(on_skipped=refuse) as listener:
        sides = [tuple(read_summaries((side,), listener)) for side in (base, new) if side is not None]
    if new is None:
        return compare_within(sides[0], vary=vary or (), band_fraction=within)
    return compare(*sides, vary=vary or (), band_fraction=within)
