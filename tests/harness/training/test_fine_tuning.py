"""A checkpoint of Hugging Face's own class is converted, trained on, and goes back: transformers agrees."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_bench.checkpoints.family import family_of
from moe_bench.cli import main
from moe_bench.cli.options import ScaleOption, plan_of
from moe_bench.harness.data.build import Wish, build_dataset
from moe_bench.harness.data.tokenizer import byte_tokenizer
from moe_bench.harness.training.data import read_text
from moe_bench.harness.training.program import Start, train_rank
from moe_bench.harness.workers import Seat
from moe_bench.results.training_health import HealthLine
from moe_bench.results.training_log import LogLine
from moe_bench.results.training_run import CHECKPOINTS, checkpoint_path
from moe_bench.spec.derive_training import Wishes, training_job
from moe_bench.spec.training import TrainingJob
from tests.harness.zygote import Zygote

# Megatron-Core wonders about its rank, of which a test has none
pytestmark = pytest.mark.filterwarnings("ignore:Could not determine rank")

TEXT = Path(__file__).parents[2] / "data" / "moby_dick.txt"
FP32 = (
    "precision=fp32",
    "optimizer.gradient_dtype=fp32",
    "overlap.expert_parallel=false",
    "optimizer.learning_rate=0.003",
)
NUM_STEPS = 8


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("data") / "moby"
    wish = Wish(inputs=(TEXT,), prefix=prefix, documents="paragraph", jsonl_key=None)
    build_dataset(wish, byte_tokenizer(), on_bytes=lambda done, total: None)
    return prefix


def fine_tuning(prefix: Path, recipe: str) -> TrainingJob:
    plan = plan_of(recipe, scale=ScaleOption.SMOKE, num_gpus=None, changes=list(FP32))
    wishes = Wishes(
        data=str(prefix), num_steps=NUM_STEPS, save_every=NUM_STEPS, validate_every=NUM_STEPS,
        num_validation_batches=1,
    )  # fmt: skip
    return training_job(plan, wishes, before=None)


def lines_of_rank(job: TrainingJob, folder: Path, checkpoint: Path, seat: Seat) -> list[LogLine]:
    lines: list[LogLine] = []

    def ignored(line: HealthLine) -> None:
        assert line.step

    start = Start(checkpoint=checkpoint, with_optimizer=False)
    train_rank(job, folder, start, seat.rendezvous, lines.append, ignored, listen_fd=seat.listen_fd)
    return lines


def write_random(job: TrainingJob, folder: Path) -> None:
    """What `save_pretrained` makes of a fresh model of the recipe's class."""
    model = job.plan.recipe.model
    stated = family_of(model).config(model)
    config = AutoConfig.for_model(**{key: value for key, value in stated.items() if key != "architectures"})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def loss_by_transformers(folder: Path, samples: list[dict[str, torch.Tensor]]) -> float:
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens, labels = (torch.stack([sample[key] for sample in samples]) for key in ("tokens", "labels"))
    with torch.no_grad():
        logits = network(tokens, use_cache=False).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize(
    "recipe",
    ["qwen3_30b_a3b", *(pytest.param(key, marks=pytest.mark.slow) for key in ("gpt_oss_20b", "olmoe_1b_7b"))],
)
def test_the_first_and_the_last_loss_are_those_of_transformers(
    recipe: str, prefix: Path, tmp_path: Path, zygote: Zygote
) -> None:
    job = fine_tuning(prefix, recipe)
    theirs, ours, run, again = (tmp_path / name for name in ("theirs", "ours", "run", "again"))
    write_random(job, theirs)
    of = ("--model", recipe, "--scale", "smoke")
    assert main(["convert", str(theirs), str(ours), *of, "--to", "megatron"]) == 0

    work = partial(lines_of_rank, job, run, ours)
    (lines,) = filter(None, zygote.fork(job.plan.recipe.parallel.num_gpus, work))
    last = checkpoint_path(run / CHECKPOINTS, NUM_STEPS)
    assert main(["convert", str(last), str(again), *of, "--to", "huggingface"]) == 0

    text = read_text(job, byte_tokenizer(), cache=tmp_path / "cache")
    batch_size = job.plan.recipe.global_batch_size
    first_batch, held_out = ([part[i] for i in range(batch_size)] for part in (text.train, text.valid))
    assert lines[0].loss == pytest.approx(loss_by_transformers(theirs, first_batch), rel=5e-6)
    assert lines[-1].loss < 0.9 * lines[0].loss
    assert lines[-1].validation_loss == pytest.approx(loss_by_transformers(again, held_out), rel=5e-6)
