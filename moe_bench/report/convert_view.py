"""What a conversion says: a bar on a terminal or plain lines in a log, and a line at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from moe_bench.checkpoints.rule import Rule

PLAIN_LINES = 10
"""Lines that a conversion writes into a log, evenly spaced."""


@contextlib.contextmanager
def convert_progress(rules: Sequence[Rule], console: Console) -> Iterator[Callable[[Rule], None]]:
    """Follow a conversion by the parameters that are done."""
    num_params = sum(prod(rule.shape) for rule in rules)
    if not console.is_terminal:
        yield _plain_lines(num_params, console)
        return
    with Progress(
        TextColumn("{task.fields[tensor]}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task("", total=num_params, tensor="")
        yield lambda rule: progress.update(task, advance=prod(rule.shape), tensor=rule.label)


def _plain_lines(num_params: int, console: Console) -> Callable[[Rule], None]:
    done = 0

    def on_tensor(rule: Rule) -> None:
        nonlocal done
        before, done = done, done + prod(rule.shape)
        if done * PLAIN_LINES // num_params > before * PLAIN_LINES // num_params:
            console.print(f"{done / num_params:.0%}: {rule.label}", highlight=False)

    return on_tensor


def convert_view(rules: Sequence[Rule], target: Path) -> Text:
    """How many parameters and tensors were converted, and where to, in one line."""
    num_params, num_theirs, num_ours = _counts(rules)
    return Text(
        f"{num_params:,} parameters, {num_theirs:,} tensors of Hugging Face's, {num_ours:,} of "
        f"Megatron-Core's: written to {target}"
    )


def convert_json(rules: Sequence[Rule], target: Path) -> dict[str, object]:
    """`convert_view` as JSON."""
    num_params, num_theirs, num_ours = _counts(rules)
    return {
        "target": str(target),
        "num_params": num_params,
        "num_huggingface_tensors": num_theirs,
        "num_megatron_tensors": num_ours,
    }


def _counts(rules: Sequence[Rule]) -> tuple[int, int, int]:
    """Parameters, tensors on Hugging Face's side without copies, tensors on Megatron-Core's."""
    return (
        sum(prod(rule.shape) for rule in rules),
        sum(len(rule.huggingface) for rule in rules),
        len({rule.megatron for rule in rules}),
    )
