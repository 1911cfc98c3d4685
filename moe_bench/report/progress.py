"""What a run says while it runs: substitutions first, then a bar on a terminal or plain lines in a log."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moe_bench.report.recipe_list import layout_label
from moe_bench.report.show import substitution_table
from moe_bench.spec.scale import Plan

StepSeen = Callable[[int, int, float | None], None]
"""Called after each step with its number from 1, the number of all steps, and the loss if there is one."""

MAX_PLAIN_LINES = 20
"""Lines that a long run writes into a log, evenly spaced."""


def announce(plan: Plan, console: Console) -> None:
    """Say what will run, and every substitution, before it starts."""
    recipe = plan.recipe
    unit = "processes" if recipe.system.gpu is None else "GPUs"
    whole = f"{recipe.parallel.num_gpus} {unit}"
    console.print(
        f"{plan.asked} at {plan.scale} scale: {f'rank {plan.rank} of {whole}' if plan.is_slice else whole} "
        f"({layout_label(recipe) or 'DP1'}), "
        f"{recipe.steps.num_warmup} warm-up and {recipe.steps.num_timed} timed steps",
        highlight=False,
    )
    if plan.modified:
        console.print(f"modified: {', '.join(plan.modified)}", highlight=False)
    if plan.substitutions:
        console.print(substitution_table(plan.substitutions))


@contextlib.contextmanager
def step_progress(plan: Plan, console: Console, *, is_alone: bool) -> Iterator[StepSeen]:
    """Follow the steps: with a bar where this process is alone on a terminal, else with plain lines.

    The rank that knows the loss need not be the first, so several ranks' bars would overwrite one another.
    """
    if not (is_alone and console.is_terminal):
        yield _plain_lines(console)
        return
    # no refresh thread: the ranks are forked from this process, and a fork must copy no other thread
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
        console=console,
        auto_refresh=False,
        transient=True,
    ) as progress:
        task = progress.add_task("starting", total=None, loss="")
        progress.refresh()

        def seen(step: int, num_steps: int, loss: float | None) -> None:
            phase = "warm-up" if step <= plan.recipe.steps.num_warmup else "timed"
            progress.update(
                task,
                completed=step,
                total=num_steps,
                description=phase,
                loss=_loss_text(loss),
                refresh=True,
            )

        yield seen


def _plain_lines(console: Console) -> StepSeen:
    def seen(step: int, num_steps: int, loss: float | None) -> None:
        stride = max(1, num_steps // MAX_PLAIN_LINES)
        if step % stride == 0 or step in (1, num_steps):
            console.print(f"step {step}/{num_steps} {_loss_text(loss)}".rstrip(), highlight=False)

    return seen


def _loss_text(loss: float | None) -> str:
    return "" if loss is None else f"loss {loss:.4f}"
