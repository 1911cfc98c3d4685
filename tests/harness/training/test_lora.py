"""Adapters learn on frozen weights: the same in two layouts, taken up again, and added up on the way back."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe_bench.cli import main
from moe_bench.errors import BadInputError
from moe_bench.harness.data.tokenizer import byte_tokenizer
from moe_bench.harness.training.data import read_text
from moe_bench.harness.training.evaluate import Question, evaluate
from moe_bench.harness.training.program import Start
from moe_bench.results.evaluation import Evaluation
from moe_bench.results.training_log import LogLine
from moe_bench.results.training_run import CHECKPOINTS, checkpoint_path
from moe_bench.spec.training import TrainingJob
from tests.harness.convert.checkpoints import read_folder
from tests.harness.training.fine_tuning import (
    NUM_STEPS,
    byte_dataset,
    fine_tuning,
    loss_by_transformers,
    write_random,
)
from tests.harness.training.ranks import lines_of_rank
from tests.harness.zygote import Zygote

pytest.importorskip("modelopt", reason="adapters are nvidia-modelopt's: pip install 'moe_bench[modelopt]'")

# Megatron-Core wonders about its rank, of which a test has none
pytestmark = pytest.mark.filterwarnings("ignore:Could not determine rank")

RECIPE = "qwen3_30b_a3b"
OF = ("--model", RECIPE, "--scale", "smoke")
SPREAD = (
    "parallel.tensor=2",
    "parallel.sequence_parallel=true",
    'env.CUDA_DEVICE_MAX_CONNECTIONS="1"',
)
LORA_RANK = 4


def trained(zygote: Zygote, job: TrainingJob, folder: Path, start: Start) -> list[LogLine]:
    work = partial(lines_of_rank, job, folder, start)
    (lines,) = filter(None, zygote.fork(job.plan.recipe.parallel.num_gpus, work))
    return list(lines)


def losses(lines: list[LogLine]) -> list[float]:
    return [line.loss for line in lines]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_dataset(tmp_path_factory.mktemp("data") / "moby")


@pytest.fixture(scope="module")
def weights(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of Hugging Face's class, `theirs`, and the same as a distributed checkpoint, `ours`."""
    folder = tmp_path_factory.mktemp("weights")
    write_random(fine_tuning(prefix, RECIPE), folder / "theirs")
    assert main(["convert", str(folder / "theirs"), str(folder / "ours"), *OF, "--to", "megatron"]) == 0
    return folder


@pytest.fixture(scope="module")
def run(
    prefix: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory, zygote: Zygote
) -> tuple[Path, list[LogLine]]:
    folder = tmp_path_factory.mktemp("run")
    job = fine_tuning(prefix, RECIPE, lora_rank=LORA_RANK, save_every=NUM_STEPS // 2)
    return folder, trained(zygote, job, folder, Start(checkpoint=weights / "ours", with_optimizer=False))


def checkpoint(run: tuple[Path, list[LogLine]], step: int) -> Path:
    return checkpoint_path(run[0] / CHECKPOINTS, step)


def test_adapters_begin_at_the_weights_and_learn_the_same_in_two_layouts(
    run: tuple[Path, list[LogLine]], prefix: Path, weights: Path, tmp_path: Path, zygote: Zygote
) -> None:
    job = fine_tuning(prefix, RECIPE, *SPREAD, lora_rank=LORA_RANK)
    start = Start(checkpoint=weights / "ours", with_optimizer=False)
    first_batch = samples(job, tmp_path, "train")
    assert run[1][0].loss == pytest.approx(loss_by_transformers(weights / "theirs", first_batch), rel=5e-6)
    assert run[1][-1].loss < run[1][0].loss
    assert losses(trained(zygote, job, tmp_path, start)) == pytest.approx(losses(run[1]), rel=5e-6)


def samples(job: TrainingJob, folder: Path, part: str) -> list[dict[str, torch.Tensor]]:
    text = read_text(job, byte_tokenizer(), cache=folder / "cache")
    return [getattr(text, part)[index] for index in range(job.plan.recipe.global_batch_size)]


def test_a_run_of_adapters_goes_on_to_the_very_same_losses(
    run: tuple[Path, list[LogLine]], prefix: Path, tmp_path: Path, zygote: Zygote
) -> None:
    job = fine_tuning(prefix, RECIPE, lora_rank=LORA_RANK)
    again = trained(zygote, job, tmp_path, Start(checkpoint=checkpoint(run, NUM_STEPS // 2)))
    assert losses(again) == losses(run[1])[NUM_STEPS // 2 :]


def test_converted_back_attention_has_learned_and_transformers_says_the_same_loss(
    run: tuple[Path, list[LogLine]], prefix: Path, weights: Path, tmp_path: Path
) -> None:
    again, last = tmp_path / "again", checkpoint(run, NUM_STEPS)
    assert main(["convert", str(last), str(again), *OF, "--to", "huggingface"]) == 0
    held_out = samples(fine_tuning(prefix, RECIPE, lora_rank=LORA_RANK), tmp_path, "valid")
    assert run[1][-1].validation_loss == pytest.approx(loss_by_transformers(again, held_out), rel=5e-6)
    first_tensors, last_tensors = load_file(weights / "theirs" / "model.safetensors"), read_folder(again)
    for name, tensor in first_tensors.items():
        is_adapted = name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"))
        assert torch.equal(tensor, last_tensors[name]) != is_adapted, name


def test_a_checkpoint_with_adapters_is_evaluated_with_them(
    run: tuple[Path, list[LogLine]], prefix: Path, weights: Path, zygote: Zygote
) -> None:
    job = fine_tuning(prefix, RECIPE)
    found: list[Evaluation] = [
        zygote.call(
            partial(evaluate, rendezvous=None),
            Question(plan=job.plan, checkpoint=path, data=job.data, held_out_fraction=0.01),
        )
        for path in (weights / "ours", checkpoint(run, NUM_STEPS))
    ]
    before, after = (one.loss for one in found)
    assert after < before - 0.5 * (run[1][0].loss - run[1][-1].loss)


def test_training_all_weights_of_a_checkpoint_with_adapters_is_refused(
    run: tuple[Path, list[LogLine]], prefix: Path, tmp_path: Path, zygote: Zygote
) -> None:
    start = Start(checkpoint=checkpoint(run, NUM_STEPS), with_optimizer=False)
    with pytest.raises(BadInputError, match="the checkpoint has adapters and the model has none"):
        trained(zygote, fine_tuning(prefix, RECIPE), tmp_path, start)
    with pytest.raises(BadInputError, match=r"lora_a.*: \[4, 64\] was saved and the model has \[8, 64\]"):
        trained(zygote, fine_tuning(prefix, RECIPE, lora_rank=8), tmp_path, start)


@pytest.mark.slow
def test_latent_attention_learns_the_same_in_two_layouts(
    prefix: Path, tmp_path: Path, zygote: Zygote
) -> None:
    start = Start(checkpoint=None)
    wide = fine_tuning(prefix, "deepseek_v3", lora_rank=LORA_RANK)
    narrow = fine_tuning(prefix, "deepseek_v3", *SPREAD, lora_rank=LORA_RANK)
    found = [
        losses(trained(zygote, job, tmp_path / str(job.plan.recipe.parallel.tensor), start))
        for job in (wide, narrow)
    ]
    assert found[0] == pytest.approx(found[1], rel=5e-6)
