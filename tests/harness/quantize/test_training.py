"""Quantisation-aware training begins with weights, goes on with scales, and is what its checkpoint says."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed: pip install 'moe_bench[modelopt]'")

from moe_bench.checkpoints.family import family_of
from moe_bench.cli.options import ScaleOption, plan_of
from moe_bench.errors import BadInputError
from moe_bench.harness.convert.to_huggingface import MegatronReader
from moe_bench.harness.data.build import Wish, build_dataset
from moe_bench.harness.data.tokenizer import byte_tokenizer
from moe_bench.harness.training.program import Start, train_rank
from moe_bench.harness.workers import Seat
from moe_bench.results.training_log import LogLine
from moe_bench.results.training_run import CHECKPOINTS, checkpoint_path
from moe_bench.spec.derive_training import Wishes, training_job
from moe_bench.spec.training import TrainingJob
from tests.harness.quantize.jobs import alone, job_of, quantized
from tests.harness.zygote import Zygote

TEXT = Path(__file__).parents[2] / "data" / "moby_dick.txt"
LEARNS_QUANTISED = (
    "quantization.format=nvfp4",
    "kernels.fusions.gradient_accumulation=false",
    "cuda_graphs={}",
)
pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """Two steps without quantisers, and two with them from the weights of the first two."""

    data: str
    plain: Path
    plain_lines: list[LogLine]
    quantised: Path
    quantised_lines: list[LogLine]


def job(data: str, *changes: str) -> TrainingJob:
    plan = plan_of(
        "qwen3_30b_a3b", scale=ScaleOption.SMOKE, num_gpus=None, changes=list(changes), rounds=True
    )
    wishes = Wishes(data=data, num_steps=2, save_every=1, num_validation_batches=1)
    return training_job(plan, wishes, before=None)


def trained(zygote: Zygote, asked: TrainingJob, folder: Path, start: Start) -> list[LogLine]:
    found = zygote.fork(asked.plan.num_ranks, partial(lines, asked, folder, start))
    (mine,) = filter(None, found)
    assert isinstance(mine, list)
    return mine


def lines(asked: TrainingJob, folder: Path, start: Start, seat: Seat) -> list[LogLine]:
    written: list[LogLine] = []
    train_rank(
        asked, folder, start, seat.rendezvous, written.append, lambda line: None, listen_fd=seat.listen_fd
    )
    return written


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Runs:
    folder = tmp_path_factory.mktemp("quantised")
    prefix, text = folder / "moby", folder / "moby.txt"
    text.write_text(TEXT.read_text()[:100_000])
    wish = Wish(inputs=(text,), prefix=prefix, documents="paragraph", jsonl_key=None)
    build_dataset(wish, byte_tokenizer(), on_bytes=lambda done, total: None)
    data, plain, quantised = str(prefix), folder / "plain", folder / "quantised"
    plain_lines = trained(zygote, job(data), plain, Start(checkpoint=None))
    begins = Start(checkpoint=checkpoint_path(plain / CHECKPOINTS, 2), with_optimizer=False)
    quantised_lines = trained(zygote, job(data, *LEARNS_QUANTISED), quantised, begins)
    return Runs(
        data=data,
        plain=plain,
        plain_lines=plain_lines,
        quantised=quantised,
        quantised_lines=quantised_lines,
    )


def test_a_checkpoint_has_the_loss_that_its_training_said(runs: Runs, zygote: Zygote) -> None:
    asked = alone(job_of("qwen3_30b_a3b", format="fp8", data=runs.data))
    found = quantized(zygote, asked, checkpoint_path(runs.plain / CHECKPOINTS, 2)).report
    # two layouts sum in another order, in BF16
    assert found.loss == pytest.approx(runs.plain_lines[-1].validation_loss, rel=1e-3)
    assert found.num_tokens == asked.plan.recipe.tokens_per_step


def test_a_model_that_has_learned_with_quantisers_is_kept_with_its_scales(runs: Runs, zygote: Zygote) -> None:
    asked = alone(job_of("qwen3_30b_a3b", *LEARNS_QUANTISED, format=None, data=runs.data))
    found = quantized(zygote, asked, checkpoint_path(runs.quantised / CHECKPOINTS, 2))
    assert found.report.quantized_loss == pytest.approx(runs.quantised_lines[-1].validation_loss, rel=1e-3)
    assert found.report.loss != found.report.quantized_loss
    before = quantized(zygote, asked, checkpoint_path(runs.quantised / CHECKPOINTS, 1))
    # the weights have moved, and the scales of whole tensors are those of the calibration
    assert before.largest == found.largest
    assert min(found.largest.values()) > 0
    first, last = (line.validation_loss or 0.0 for line in runs.quantised_lines)
    assert 0 < last < first


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_losses(runs: Runs, zygote: Zygote, tmp_path: Path) -> None:
    start = Start(checkpoint=checkpoint_path(runs.quantised / CHECKPOINTS, 1))
    assert trained(zygote, job(runs.data, *LEARNS_QUANTISED), tmp_path, start) == runs.quantised_lines[1:]


@pytest.mark.slow
def test_a_run_without_quantisers_does_not_go_on_with_them(
    runs: Runs, zygote: Zygote, tmp_path: Path
) -> None:
    start = Start(checkpoint=checkpoint_path(runs.plain / CHECKPOINTS, 1))
    with pytest.raises(
        BadInputError, match=r"quantizer\._amax: the model has it and the checkpoint does not"
    ):
        trained(zygote, job(runs.data, *LEARNS_QUANTISED), tmp_path, start)


@pytest.mark.slow
def test_a_plain_checkpoint_is_not_made_of_one_with_scales(runs: Runs, tmp_path: Path) -> None:
    model = job(runs.data).plan.recipe.model
    rules = tuple(family_of(model).rules(model, num_mtp_layers=0))
    with pytest.raises(BadInputError, match="moe-bench quantize --export"):
        MegatronReader(checkpoint_path(runs.quantised / CHECKPOINTS, 2)).require_match(rules)
