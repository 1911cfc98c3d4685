"""The verbs on datasets: data build."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_bench.cli.app import MODEL, app
from moe_bench.cli.options import JsonOption, make_console

if TYPE_CHECKING:
    from moe_bench.spec.dataset import Documents

_JSON_LINES = (".jsonl", ".ndjson")

data = typer.Typer(help="Datasets of token ids for train.", no_args_is_help=True)
app.add_typer(data, name="data", rich_help_panel=MODEL)


class SplitOption(StrEnum):
    """What one document of a text is."""

    FILE = "file"
    PARAGRAPH = "paragraph"


@data.command()
def build(
    inputs: Annotated[list[Path], typer.Argument(help="Files of JSON lines (.jsonl), or of text.")],
    out: Annotated[
        Path, typer.Option("--out", metavar="PREFIX", help="Write PREFIX.bin, PREFIX.idx and PREFIX.json.")
    ],
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", help="Folder of a Hugging Face tokenizer; default: a token per byte."),
    ] = None,
    key: Annotated[str, typer.Option("--key", help="Key of the text in a JSON line.")] = "text",
    split: Annotated[
        SplitOption, typer.Option("--split", help="What one document of a text file is.")
    ] = SplitOption.FILE,
    as_json: JsonOption = False,
) -> None:
    """Make a dataset for Megatron-Core from text; the same command resumes one that was killed."""
    from moe_bench.errors import BadInputError
    from moe_bench.harness.start import quiet_imports
    from moe_bench.report.data_view import bytes_progress, manifest_view

    is_jsonl = [path.suffix in _JSON_LINES for path in inputs]
    if any(is_jsonl) and not all(is_jsonl):
        raise BadInputError("JSON lines beside text: build two datasets, or make all files one of the two")
    documents: Documents = "jsonl" if is_jsonl[0] else split.value
    with quiet_imports():
        from moe_bench.harness.data import build as harness
        from moe_bench.harness.data import tokenizer as tokenizers
    chosen = tokenizers.byte_tokenizer() if tokenizer is None else tokenizers.huggingface_tokenizer(tokenizer)
    wish = harness.Wish(
        inputs=tuple(inputs), prefix=out, documents=documents, jsonl_key=key if is_jsonl[0] else None
    )
    with bytes_progress(make_console(stderr=True)) as on_bytes:
        manifest = harness.build_dataset(wish, chosen, on_bytes=on_bytes)
    if as_json:
        typer.echo(manifest.model_dump_json(indent=1))
    else:
        make_console(stderr=False).print(manifest_view(manifest, out))
