"""What Megatron-FSDP divides is saved, and goes on under it, without it, and from a run that never had it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from moe_bench.cli.options import ScaleOption, plan_of
from moe_bench.harness.data.build import Wish, build_dataset
from moe_bench.harness.data.tokenizer import byte_tokenizer
from moe_bench.harness.training.program import Start
from moe_bench.results.training_log import LogLine
from moe_bench.results.training_run import CHECKPOINTS, checkpoint_path
from moe_bench.spec.derive_training import Wishes, training_job
from moe_bench.spec.training import TrainingJob
from tests.harness.training.ranks import lines_of_rank
from tests.harness.zygote import Zygote

TEXT = Path(__file__).parents[2] / "data" / "moby_dick.txt"
CONNECTIONS = 'env.CUDA_DEVICE_MAX_CONNECTIONS="8"'
FP32 = (
    *("precision=fp32", "optimizer.learning_rate=0.003", "overlap.expert_parallel=false"),
    *(f"optimizer.{field}=fp32" for field in ("gradient_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")),
    "optimizer.main_params_dtype=fp32",
)
FSDP, SPREAD = "parallel.data_sharding=megatron_fsdp", "parallel.data_sharding=distributed_optimizer"
DENSE = ("parallel.expert=1", *FP32)
OPTIM = ("parallel.fsdp_strategy=optim", CONNECTIONS)
MOONLIGHT = ("moonlight_16b_a3b", "parallel.expert=4", *FP32)
"""Latent attention, expert biases and shared experts: four ranks, two copies of each expert."""


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("data") / "moby"
    wish = Wish(inputs=(TEXT,), prefix=prefix, documents="paragraph", jsonl_key=None)
    build_dataset(wish, byte_tokenizer(), on_bytes=lambda done, total: None)
    return prefix


def job(prefix: Path, recipe: str, *changes: str) -> TrainingJob:
    """Three steps, the second of them saved; validation would gather weights and comes at the end."""
    plan = plan_of(recipe, scale=ScaleOption.SMOKE, num_gpus=None, changes=list(changes))
    wishes = {"num_steps": 3, "save_every": 2, "validate_every": 3, "num_validation_batches": 1}
    return training_job(plan, Wishes(data=str(prefix), **wishes), before=None)


def train(zygote: Zygote, job: TrainingJob, folder: Path, start: Path | None = None) -> list[LogLine]:
    begin = Start(checkpoint=None if start is None else checkpoint_path(start / CHECKPOINTS, 2))
    work = partial(lines_of_rank, job, folder, begin)
    (lines,) = filter(None, zygote.fork(job.plan.recipe.parallel.num_gpus, work))
    return list(lines)


def close(lines: Sequence[LogLine], others: Sequence[LogLine]) -> bool:
    return all(
        mine.loss == pytest.approx(other.loss, rel=1e-6)
        and mine.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)
        for mine, other in zip(lines, others, strict=True)
    )


@pytest.mark.parametrize(
    "changes",
    [
        ("qwen3_30b_a3b/h100_sxm_16g_bf16_alltoall", *DENSE, FSDP, *OPTIM),
        # TP2 with EP2, BF16, weights divided
        pytest.param(("mixtral_8x22b/h100_sxm_128g_bf16_fsdp",), marks=pytest.mark.slow),
        pytest.param((*MOONLIGHT, FSDP, CONNECTIONS), marks=pytest.mark.slow),
    ],
    ids=["optim", "tensor ranks", "expert bias"],
)
def test_a_run_goes_on_to_the_very_same_losses(
    changes: tuple[str, ...], prefix: Path, tmp_path: Path, zygote: Zygote
) -> None:
    asked = job(prefix, *changes)
    lines = train(zygote, asked, tmp_path / "whole")
    assert train(zygote, asked, tmp_path / "again", start=tmp_path / "whole") == lines[2:]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["optim", "optim_grads_params"])
def test_a_run_goes_on_without_it_and_one_without_it_goes_on_with_it(
    strategy: str, prefix: Path, tmp_path: Path, zygote: Zygote
) -> None:
    divided = job(prefix, *MOONLIGHT, FSDP, f"parallel.fsdp_strategy={strategy}", CONNECTIONS)
    spread = job(prefix, *MOONLIGHT, SPREAD)
    narrow = job(prefix, *MOONLIGHT[:1], *FP32, "parallel.expert=8", SPREAD)
    lines = train(zygote, divided, tmp_path / "divided")
    assert close(train(zygote, spread, tmp_path / "spread"), lines)
    assert close(train(zygote, spread, tmp_path / "left", start=tmp_path / "divided"), lines[2:])
    assert close(train(zygote, narrow, tmp_path / "narrow", start=tmp_path / "divided"), lines[2:])
    assert close(train(zygote, divided, tmp_path / "entered", start=tmp_path / "spread"), lines[2:])
