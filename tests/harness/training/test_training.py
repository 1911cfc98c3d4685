"""A toy learns real text, stops, and goes on: to the same losses, in another layout, or not at all."""

from __future__ import annotations

import errno
import functools
import math
import os
import resource
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.filesystem import _write_item

from moe_bench.cli.options import ScaleOption, plan_of
from moe_bench.errors import BadInputError, MeasurementError, MissingRequirementError
from moe_bench.harness.build import torch_optimizers
from moe_bench.harness.data.build import Wish, build_dataset
from moe_bench.harness.data.tokenizer import byte_tokenizer
from moe_bench.harness.mcore_config import megatron_arguments
from moe_bench.harness.process_groups import process_groups
from moe_bench.harness.rank import build, machine
from moe_bench.harness.settings import settings_of
from moe_bench.harness.substitution import Substitution, substituted
from moe_bench.harness.training.checkpoint import load_checkpoint
from moe_bench.harness.training.program import Start, train_rank
from moe_bench.harness.workers import Seat
from moe_bench.results.training_health import HealthLine
from moe_bench.results.training_log import LogLine
from moe_bench.results.training_run import CHECKPOINTS, checkpoint_path, saved_steps
from moe_bench.spec.derive_training import Wishes, training_job
from moe_bench.spec.training import TrainingJob
from tests.harness.zygote import Zygote

TEXT = Path(__file__).parents[2] / "data" / "moby_dick.txt"
FP32 = (
    "precision=fp32",
    "optimizer.gradient_dtype=fp32",
    "overlap.expert_parallel=false",
    "optimizer.learning_rate=0.003",
)
"""So that two layouts can be told from two models."""


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text as a dataset, a paragraph a document."""
    prefix = tmp_path_factory.mktemp("data") / "moby"
    wish = Wish(inputs=(TEXT,), prefix=prefix, documents="paragraph", jsonl_key=None)
    build_dataset(wish, byte_tokenizer(), on_bytes=lambda done, total: None)
    return prefix


def job(prefix: Path, recipe: str, *changes: str, **wishes: Any) -> TrainingJob:
    plan = plan_of(recipe, scale=ScaleOption.SMOKE, num_gpus=None, changes=list(changes))
    kept = {"num_steps": 6, "save_every": 3, "validate_every": 3, "num_validation_batches": 1} | wishes
    return training_job(plan, Wishes(data=str(prefix), **kept), before=None)


def ignored(line: HealthLine) -> None:
    """Of the experts nothing is asked."""


def trained_lines(job: TrainingJob, folder: Path, start: Start, seat: Seat) -> list[LogLine]:
    """What a rank says of its steps; only one rank says anything."""
    lines: list[LogLine] = []
    train_rank(job, folder, start, seat.rendezvous, lines.append, ignored, listen_fd=seat.listen_fd)
    return lines


def train(zygote: Zygote, job: TrainingJob, folder: Path, start: Start | None = None) -> list[LogLine]:
    work = partial(trained_lines, job, folder, start or Start(checkpoint=None))
    (lines,) = filter(None, zygote.fork(job.plan.recipe.parallel.num_gpus, work))
    return list(lines)


TWO_EXPERT_RANKS = ("qwen3_30b_a3b", *FP32)
SPREAD = (
    "parallel.tensor=2",
    "parallel.sequence_parallel=true",
    'env.CUDA_DEVICE_MAX_CONNECTIONS="1"',
)


@pytest.fixture(scope="module")
def first_run(
    prefix: Path, tmp_path_factory: pytest.TempPathFactory, zygote: Zygote
) -> tuple[Path, list[LogLine]]:
    """Six steps over two expert ranks, and the checkpoints of the third and the last."""
    folder = tmp_path_factory.mktemp("run")
    return folder, train(zygote, job(prefix, *TWO_EXPERT_RANKS), folder)


def checkpoint(run: tuple[Path, list[LogLine]], step: int) -> Path:
    return checkpoint_path(run[0] / CHECKPOINTS, step)


def test_a_run_validates_and_saves_when_it_is_to(first_run: tuple[Path, list[LogLine]]) -> None:
    folder, lines = first_run
    assert [line.step for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line.step for line in lines if line.validation_loss is not None] == [3, 6]
    assert saved_steps(folder / CHECKPOINTS) == (3, 6)
    assert lines[-1].loss < lines[0].loss


def test_a_run_that_was_stopped_goes_on_to_the_very_same_losses(
    first_run: tuple[Path, list[LogLine]], prefix: Path, tmp_path: Path, zygote: Zygote
) -> None:
    start = Start(checkpoint=checkpoint(first_run, 3))
    again = train(zygote, job(prefix, *TWO_EXPERT_RANKS, num_kept=1), tmp_path, start)
    assert again == first_run[1][3:]
    assert saved_steps(tmp_path / CHECKPOINTS) == (6,)


def with_noise(job: TrainingJob) -> TrainingJob:
    """Switch's noise on what routers see, from Megatron-Core's own random state; no toy keeps it."""
    recipe = job.plan.recipe.model_copy(update={"mcore": {"moe_input_jitter_eps": 0.1}})
    return job.model_copy(update={"plan": job.plan.model_copy(update={"recipe": recipe})})


@pytest.mark.parametrize(
    "recompute",
    [
        (),
        pytest.param(
            ("recompute.granularity=full", "recompute.method=uniform", "recompute.num_layers=1"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["kept", "recomputed"],
)
def test_a_run_with_chance_in_it_goes_on_to_the_very_same_losses(
    recompute: tuple[str, ...], prefix: Path, tmp_path: Path, zygote: Zygote
) -> None:
    asked = with_noise(job(prefix, "olmoe_1b_7b_gshard", *recompute, num_steps=4, save_every=2))
    lines = train(zygote, asked, tmp_path / "whole")
    start = Start(checkpoint=checkpoint_path(tmp_path / "whole" / CHECKPOINTS, 2))
    assert train(zygote, asked, tmp_path / "again", start) == lines[2:]


def test_it_goes_on_under_another_layout(
    first_run: tuple[Path, list[LogLine]], prefix: Path, tmp_path: Path, zygote: Zygote
) -> None:
    start = Start(checkpoint=checkpoint(first_run, 3))
    spread = job(prefix, *TWO_EXPERT_RANKS, *SPREAD)
    assert spread.plan.recipe.parallel.tensor == 2
    for mine, before in zip(train(zygote, spread, tmp_path, start), first_run[1][3:], strict=True):
        assert mine.step == before.step
        assert mine.loss == pytest.approx(before.loss, rel=2e-6)
        if before.validation_loss is not None:
            assert mine.validation_loss == pytest.approx(before.validation_loss, rel=2e-6)


def test_a_run_that_begins_with_the_weights_of_another_takes_its_own_steps(
    first_run: tuple[Path, list[LogLine]], prefix: Path, tmp_path: Path, zygote: Zygote
) -> None:
    start = Start(checkpoint=checkpoint(first_run, 6), with_optimizer=False)
    (line,) = train(zygote, job(prefix, *TWO_EXPERT_RANKS, num_steps=1), tmp_path, start)
    assert line.step == 1
    assert line.loss < first_run[1][0].loss


def test_rates_may_change_on_the_way(
    first_run: tuple[Path, list[LogLine]], prefix: Path, tmp_path: Path, zygote: Zygote
) -> None:
    changed = job(prefix, *TWO_EXPERT_RANKS, "optimizer.learning_rate=0.001", expert_factor=0.5)
    lines = train(zygote, changed, tmp_path, Start(checkpoint=checkpoint(first_run, 3)))
    for mine, before in zip(lines, first_run[1][3:], strict=True):
        assert mine.learning_rate == pytest.approx(before.learning_rate / 3)


def test_weights_that_cannot_follow_a_change_are_named(
    first_run: tuple[Path, list[LogLine]], prefix: Path, tmp_path: Path, zygote: Zygote
) -> None:
    changed = job(prefix, *TWO_EXPERT_RANKS, "model.attention.num_query_groups=32")
    with pytest.raises(BadInputError, match=r"linear_qkv\.weight: \[128, 64\] was saved .* \[192, 64\]"):
        train(zygote, changed, tmp_path, Start(checkpoint=checkpoint(first_run, 3)))


@pytest.mark.parametrize("damage", ["cut short", "metadata gone"])
def test_a_damaged_checkpoint_is_refused_in_one_line(
    first_run: tuple[Path, list[LogLine]], prefix: Path, tmp_path: Path, zygote: Zygote, damage: str
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in checkpoint(first_run, 6).iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    if damage == "cut short":
        shard = max(broken.glob("*.distcp"))
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        (broken / ".metadata").unlink()
    with pytest.raises(BadInputError, match="broken: ") as caught:
        train(zygote, job(prefix, *TWO_EXPERT_RANKS), tmp_path, Start(checkpoint=broken))
    assert "\n" not in str(caught.value)


def test_too_little_text_is_refused(prefix: Path, tmp_path: Path, zygote: Zygote) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A paragraph.\n\nAnother.\n")
    wish = Wish(inputs=(short,), prefix=tmp_path / "short", documents="paragraph", jsonl_key=None)
    build_dataset(wish, byte_tokenizer(), on_bytes=lambda done, total: None)
    with pytest.raises(BadInputError, match="too few documents for sequences of 64 tokens"):
        train(zygote, job(wish.prefix, *TWO_EXPERT_RANKS), tmp_path)


def betas_and_moments(job: TrainingJob, checkpoint: Path, seat: Seat) -> tuple[set[Any], bool]:
    """Of an optimizer that has taken up a checkpoint: its betas, and whether it has moments."""
    arguments = megatron_arguments(job.plan.recipe)
    settings, rank = settings_of(arguments), seat.rendezvous
    sizes = arguments.parallel_state
    with (
        machine(settings, rank) as (device, _),
        process_groups(rank, backend="gloo", sizes=sizes, listen_fd=seat.listen_fd),
    ):
        built = build(arguments, settings, device=device, rates=job.learning_rate)
        load_checkpoint(built, checkpoint)
        inner = list(torch_optimizers(built.optimizer))
        states = [state for one in inner for state in one.state.values()]
        return (
            {tuple(group["betas"]) for one in inner for group in one.param_groups},
            bool(states) and all(bool(state["exp_avg_sq"].any()) for state in states),
        )


def test_betas_may_change_on_the_way(
    first_run: tuple[Path, list[LogLine]], prefix: Path, zygote: Zygote
) -> None:
    changed = job(prefix, *TWO_EXPERT_RANKS, "optimizer.adam_beta1=0.8", "optimizer.adam_beta2=0.98")
    work = partial(betas_and_moments, changed, checkpoint(first_run, 3))
    assert zygote.fork(2, work) == [({(0.8, 0.98)}, True)] * 2


@functools.wraps(_write_item)  # the writer asks which arguments it has
def refuse_second_checkpoint(*arguments: Any, **options: Any) -> Any:
    """Stands for the function that writes one tensor into an open file."""
    if any("step-0000002" in str(getattr(argument, "name", "")) for argument in arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return _write_item(*arguments, **options)


def on_a_full_disk(job: TrainingJob, folder: Path, seat: Seat) -> list[LogLine]:
    with substituted(Substitution(filesystem_async, "_write_item", refuse_second_checkpoint)):
        return trained_lines(job, folder, Start(checkpoint=None), seat)


def test_a_full_disk_is_one_line_and_keeps_the_checkpoints_before(
    prefix: Path, tmp_path: Path, zygote: Zygote
) -> None:
    short = job(prefix, *TWO_EXPERT_RANKS, num_steps=2, save_every=1, num_kept=1)
    with pytest.raises(MissingRequirementError, match=r"No space left .* step 1 is whole") as caught:
        zygote.fork(2, partial(on_a_full_disk, short, tmp_path))
    assert "\n" not in str(caught.value)
    assert not getattr(caught.value, "__notes__", ())
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["step-0000001"]
    assert zygote.call(num_descendants) == 0


def with_small_files(job: TrainingJob, folder: Path, num_bytes: int, seat: Seat) -> list[LogLine]:
    """Where the system refuses in the middle of a write, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    return trained_lines(job, folder, Start(checkpoint=None), seat)


@pytest.mark.parametrize(
    ("num_bytes", "problem"),
    [
        (20_000, r"run: the order of samples could not be written \(.*\); make room"),
        (200_000, r"checkpoint could not be written \(.* bytes free\); there was none before"),
    ],
)
def test_a_disk_that_is_full_within_a_file_is_one_line_and_leaves_no_part_of_it(
    num_bytes: int, problem: str, prefix: Path, tmp_path: Path, zygote: Zygote
) -> None:
    short, folder = job(prefix, *TWO_EXPERT_RANKS, num_steps=1, save_every=1), tmp_path / "run"
    with pytest.raises(MissingRequirementError, match=problem) as caught:
        zygote.fork(2, partial(with_small_files, short, folder, num_bytes))
    assert "\n" not in str(caught.value)
    assert not list(folder.glob(f"{CHECKPOINTS}/*"))
    whole = 8 if "checkpoint" in problem else 0  # four files of each part of the text
    assert len([path for path in folder.rglob("*") if path.is_file()]) == whole


@functools.wraps(_write_item)
def write_when_told(*arguments: Any, **options: Any) -> Any:
    """Waits for the file `go` in the folder of the run."""
    path = next(Path(argument.name) for argument in arguments if hasattr(argument, "name"))
    go = path.parents[2] / "go"
    for _ in range(6000):
        if go.exists():
            break
        time.sleep(0.01)
    assert go.exists(), "training waits for its checkpoint"
    return _write_item(*arguments, **options)


def told_after_the_second_step(job: TrainingJob, folder: Path, seat: Seat) -> None:
    def on_line(line: LogLine) -> None:
        if line.step == 2:
            assert saved_steps(folder / CHECKPOINTS) == ()
            (folder / "go").touch()

    with substituted(Substitution(filesystem_async, "_write_item", write_when_told)):
        start = Start(checkpoint=None)
        train_rank(job, folder, start, seat.rendezvous, on_line, ignored, listen_fd=seat.listen_fd)


def test_training_goes_on_while_a_checkpoint_is_written(prefix: Path, tmp_path: Path, zygote: Zygote) -> None:
    asked = job(prefix, *TWO_EXPERT_RANKS, num_steps=3, save_every=1)
    zygote.fork(2, partial(told_after_the_second_step, asked, tmp_path))
    assert saved_steps(tmp_path / CHECKPOINTS) == (2, 3)


@functools.wraps(_write_item)
def kill_in_second_checkpoint(*arguments: Any, **options: Any) -> Any:
    """Kills the rank when its writer has begun."""
    written = _write_item(*arguments, **options)
    if any("step-0000002" in str(getattr(argument, "name", "")) for argument in arguments):
        os.kill(os.getppid(), signal.SIGKILL)
    return written


def killed_within_a_save(job: TrainingJob, folder: Path, seat: Seat) -> list[LogLine]:
    with substituted(Substitution(filesystem_async, "_write_item", kill_in_second_checkpoint)):
        return trained_lines(job, folder, Start(checkpoint=None), seat)


def test_a_kill_within_a_save_keeps_the_checkpoints_before_and_the_run_goes_on(
    first_run: tuple[Path, list[LogLine]], prefix: Path, tmp_path: Path, zygote: Zygote
) -> None:
    rates = {"num_warmup_steps": 1, "num_decay_steps": 6}
    asked = job(prefix, *TWO_EXPERT_RANKS, num_steps=3, save_every=1, **rates)
    with pytest.raises(MeasurementError, match="signal 9"):
        zygote.fork(2, partial(killed_within_a_save, asked, tmp_path))
    checkpoints = tmp_path / CHECKPOINTS
    assert saved_steps(checkpoints) == (1,)
    assert {path.name for path in checkpoints.iterdir()} == {"step-0000001", ".step-0000002.unfinished"}
    goes_on = job(prefix, *TWO_EXPERT_RANKS, num_steps=3, save_every=3, **rates)
    lines = train(zygote, goes_on, tmp_path, Start(checkpoint=checkpoint_path(checkpoints, 1)))
    assert [line.loss for line in lines] == [line.loss for line in first_run[1][1:3]]
    assert {path.name for path in checkpoints.iterdir()} == {"step-0000001", "step-0000003"}


def num_descendants() -> int:
    return len(psutil.Process().children(recursive=True))


def killed_after_a_save(job: TrainingJob, folder: Path, seat: Seat) -> None:
    def on_line(line: LogLine) -> None:
        if line.step == 2:
            ranks = psutil.Process(os.getppid()).children()
            helpers = [child.pid for rank in ranks for child in rank.children(recursive=True)]
            (folder / "helpers").write_text(" ".join(map(str, helpers)))
            os.kill(os.getpid(), signal.SIGKILL)

    start = Start(checkpoint=None)
    train_rank(job, folder, start, seat.rendezvous, on_line, ignored, listen_fd=seat.listen_fd)


@pytest.mark.slow
def test_what_writes_checkpoints_does_not_outlive_a_killed_rank(
    prefix: Path, tmp_path: Path, zygote: Zygote
) -> None:
    short = job(prefix, *TWO_EXPERT_RANKS, num_steps=3, save_every=1)
    with pytest.raises(MeasurementError, match="signal 9"):
        zygote.fork(2, partial(killed_after_a_save, short, tmp_path))
    helpers = [int(pid) for pid in (tmp_path / "helpers").read_text().split()]
    assert len(helpers) >= 2
    alive = [psutil.Process(pid) for pid in helpers if psutil.pid_exists(pid)]
    assert psutil.wait_procs(alive, timeout=30)[1] == []


def unigram_entropy(data: bytes) -> float:
    """Loss in nats per token of who knows how often each byte comes, and nothing else."""
    counts = Counter(data)
    return -sum(count / len(data) * math.log(count / len(data)) for count in counts.values())


@pytest.mark.parametrize(
    ("recipe", "num_steps"),
    [
        ("qwen3_30b_a3b", 30),
        pytest.param("deepseek_v3", 100, marks=pytest.mark.slow),
        pytest.param("gpt_oss_20b", 40, marks=pytest.mark.slow),
    ],
)
def test_a_toy_of_the_recipe_learns_more_than_how_often_letters_come(
    recipe: str, num_steps: int, prefix: Path, tmp_path: Path, zygote: Zygote
) -> None:
    lines = train(
        zygote,
        job(
            prefix, recipe, "optimizer.learning_rate=0.005",
            num_steps=num_steps, num_validation_batches=4, save_every=num_steps,
        ),
        tmp_path,
    )  # fmt: skip
    paragraphs = TEXT.read_bytes().split(b"\n\n")
    held_out = b"\n".join(paragraphs[int(len(paragraphs) * 0.95) :])
    assert lines[-1].validation_loss is not None
    assert lines[-1].validation_loss < unigram_entropy(held_out)
