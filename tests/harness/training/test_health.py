"""What a training run counts of its experts: all choices of all tokens, over stages and ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from moe_bench.cli.options import ScaleOption, plan_of
from moe_bench.harness.data.build import Wish, build_dataset
from moe_bench.harness.data.tokenizer import byte_tokenizer
from moe_bench.harness.training.program import Start, train_rank
from moe_bench.harness.workers import Seat
from moe_bench.results.training_health import HealthLine
from moe_bench.results.training_log import LogLine
from moe_bench.spec.derive_training import TOY_BATCH_SIZE, Wishes, training_job
from moe_bench.spec.training import TrainingJob
from tests.harness.zygote import Zygote

TEXT = Path(__file__).parents[2] / "data" / "moby_dick.txt"


def heard(job: TrainingJob, folder: Path, seat: Seat) -> list[HealthLine]:
    lines: list[HealthLine] = []

    def ignored(line: LogLine) -> None:
        assert line.step

    train_rank(
        job,
        folder,
        Start(checkpoint=None),
        seat.rendezvous,
        ignored,
        lines.append,
        listen_fd=seat.listen_fd,
    )
    return lines


def job(tmp_path: Path, recipe: str, *changes: str) -> TrainingJob:
    wish = Wish(inputs=(TEXT,), prefix=tmp_path / "moby", documents="paragraph", jsonl_key=None)
    build_dataset(wish, byte_tokenizer(), on_bytes=lambda done, total: None)
    plan = plan_of(recipe, scale=ScaleOption.SMOKE, num_gpus=None, changes=list(changes))
    wishes = Wishes(
        data=str(wish.prefix), num_steps=3, save_every=3, validate_every=3,
        num_validation_batches=1, health_every=2,
    )  # fmt: skip
    return training_job(plan, wishes, before=None)


def run(zygote: Zygote, asked: TrainingJob, folder: Path) -> list[HealthLine]:
    (lines,) = filter(None, zygote.fork(asked.plan.recipe.parallel.num_gpus, partial(heard, asked, folder)))
    return list(lines)


@pytest.mark.parametrize(
    ("recipe", "layers"),
    [
        pytest.param("qwen3_30b_a3b", ["decoder.0", "decoder.1"], marks=pytest.mark.slow),
        ("deepseek_v3", ["decoder.1", "decoder.2", "decoder.3", "decoder.4"]),
    ],
)
def test_every_choice_of_every_token_is_counted_once(
    recipe: str, layers: list[str], tmp_path: Path, zygote: Zygote
) -> None:
    asked = job(tmp_path, recipe)
    lines = run(zygote, asked, tmp_path / "run")
    assert [(line.step, line.num_steps) for line in lines] == [(2, 2), (3, 1)]
    model = asked.plan.recipe.model
    assert model.moe is not None
    for line in lines:
        assert [layer.layer for layer in line.layers] == layers
        for layer in line.layers:
            num_tokens = line.num_steps * TOY_BATCH_SIZE * asked.plan.recipe.seq_len
            assert layer.num_tokens == num_tokens
            assert len(layer.tokens_per_expert) == model.moe.num_experts
            assert sum(layer.tokens_per_expert) == num_tokens * model.moe.top_k
            assert layer.dropped_fraction == 0.0
            assert (layer.expert_bias_range is not None) == model.moe.router.expert_bias


def test_a_padded_capacity_does_not_hide_what_was_dropped(tmp_path: Path, zygote: Zygote) -> None:
    changes = (
        "token_drop.capacity_factor=0.5",
        "token_drop.pad_to_capacity=true",
        "overlap.expert_parallel=false",
    )
    lines = run(zygote, job(tmp_path, "qwen3_30b_a3b", *changes), tmp_path / "run")
    for layer in lines[-1].layers:
        # half of the places that balance would need
        assert layer.dropped_fraction is not None
        assert layer.dropped_fraction >= 0.5
