"""Toys whose layouts learn alike, and toys that do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_bench.cli.options import ScaleOption, plan_of
from moe_bench.errors import MissingRequirementError
from moe_bench.harness.data.build import Wish, build_dataset
from moe_bench.harness.data.tokenizer import byte_tokenizer
from moe_bench.harness.training.parity import ParityCase, Trained, compare_losses
from moe_bench.results.parity import Parity
from moe_bench.spec.derive_training import Wishes, training_job
from moe_bench.spec.training import TrainingJob
from tests.harness.zygote import Zygote

TEXT = Path(__file__).parents[2] / "data" / "moby_dick.txt"
FP32 = ("precision=fp32", "optimizer.gradient_dtype=fp32", "overlap.expert_parallel=false")
SPREAD = (
    "parallel.tensor=2",
    "parallel.sequence_parallel=true",
    'env.CUDA_DEVICE_MAX_CONNECTIONS="1"',
)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("data") / "moby"
    wish = Wish(inputs=(TEXT,), prefix=prefix, documents="paragraph", jsonl_key=None)
    build_dataset(wish, byte_tokenizer(), on_bytes=lambda done, total: None)
    return prefix


def job(prefix: Path, scale: ScaleOption, *changes: str) -> TrainingJob:
    plan = plan_of("qwen3_30b_a3b", scale=scale, num_gpus=None, changes=[*FP32, *changes])
    wishes = Wishes(data=str(prefix), num_steps=2, validate_every=2, num_validation_batches=1, save_every=2)
    return training_job(plan, wishes, before=None)


def compared(prefix: Path, varied: tuple[str, ...]) -> Parity:
    """Runs in the zygote, from which ranks can be forked."""
    case = ParityCase(
        base=job(prefix, ScaleOption.SMOKE),
        variant=job(prefix, ScaleOption.SMOKE, *varied),
        varied=varied,
        num_repeats=2,
    )
    return compare_losses(
        case,
        environment={},
        command=("test",),
        source_root=prefix.parent,
        on_run=lambda name: None,
        trained=Trained(),
    )


def test_another_layout_learns_alike(prefix: Path, zygote: Zygote) -> None:
    found: Parity = zygote.call(compared, prefix, SPREAD)
    assert found.is_equal
    # repeats did start from other weights, by no more than a rounding
    assert any(repeat != found.base.learned for repeat in found.repeats)
    assert [curve.name for curve in found.curves] == ["loss", "gradient norm"]
    assert all(max(curve.tolerances) < 1e-3 for curve in found.curves)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["optimizer.learning_rate=0.003", "seed=7"])
def test_another_rate_or_seed_does_not(change: str, prefix: Path, zygote: Zygote) -> None:
    found: Parity = zygote.call(compared, prefix, (change,))
    # the first loss and norm are taken before any rate matters
    steps = {curve.first_different_step for curve in found.curves}
    assert steps == ({1} if change.startswith("seed") else {2})


def test_ranks_on_gpus_are_not_forked(prefix: Path) -> None:
    full = job(prefix, ScaleOption.FULL)
    case = ParityCase(base=full, variant=full, varied=("seed=7",), num_repeats=2)
    with pytest.raises(MissingRequirementError, match="--scale smoke"):
        compare_losses(case, environment={}, command=(), source_root=prefix, on_run=print, trained=Trained())
