"""A checkpoint of Hugging Face's own class is converted, trained on, and goes back: transformers agrees."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from moe_bench.cli import main
from moe_bench.harness.data.tokenizer import byte_tokenizer
from moe_bench.harness.training.data import read_text
from moe_bench.harness.training.program import Start
from moe_bench.results.training_run import CHECKPOINTS, checkpoint_path
from tests.harness.training.fine_tuning import (
    NUM_STEPS,
    byte_dataset,
    fine_tuning,
    loss_by_transformers,
    write_random,
)
from tests.harness.training.ranks import lines_of_rank
from tests.harness.zygote import Zygote

# Megatron-Core wonders about its rank, of which a test has none
pytestmark = pytest.mark.filterwarnings("ignore:Could not determine rank")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_dataset(tmp_path_factory.mktemp("data") / "moby")


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

    work = partial(lines_of_rank, job, run, Start(checkpoint=ours, with_optimizer=False))
    (lines,) = filter(None, zygote.fork(job.plan.recipe.parallel.num_gpus, work))
    last = checkpoint_path(run / CHECKPOINTS, NUM_STEPS)
    assert main(["convert", str(last), str(again), *of, "--to", "huggingface"]) == 0

    text = read_text(job, byte_tokenizer(), cache=tmp_path / "cache")
    batch_size = job.plan.recipe.global_batch_size
    first_batch, held_out = ([part[i] for i in range(batch_size)] for part in (text.train, text.valid))
    assert lines[0].loss == pytest.approx(loss_by_transformers(theirs, first_batch), rel=5e-6)
    assert lines[-1].loss < 0.9 * lines[0].loss
    assert lines[-1].validation_loss == pytest.approx(loss_by_transformers(again, held_out), rel=5e-6)
