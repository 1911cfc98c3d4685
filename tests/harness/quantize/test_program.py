"""A toy quantised: what moves, what stays, and that off is the model as it was."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed: pip install 'moe_bench[modelopt]'")

from moe_bench.cli.options import ScaleOption, plan_of
from moe_bench.harness.data.build import Wish, build_dataset
from moe_bench.harness.data.tokenizer import byte_tokenizer
from moe_bench.harness.quantize.program import quantize_rank
from moe_bench.harness.training.program import Start, train_rank
from moe_bench.harness.workers import Seat
from moe_bench.results.quantization import PartSize, Quantization
from moe_bench.results.training_log import LogLine
from moe_bench.results.training_run import CHECKPOINTS, checkpoint_path
from moe_bench.spec.derive_training import Wishes, training_job
from moe_bench.spec.quantization import QuantizeJob, quantize_job
from moe_bench.spec.training import TrainingJob
from tests.harness.zygote import Zygote

TEXT = Path(__file__).parents[2] / "data" / "moby_dick.txt"
pytestmark = pytest.mark.filterwarnings("ignore")


def job_of(recipe: str, **asked: Any) -> QuantizeJob:
    plan = plan_of(recipe, scale=ScaleOption.SMOKE, num_gpus=None, changes=[])
    asked = {"experts_only": False, "num_evaluation_batches": 1} | asked
    return quantize_job(plan, data=None, num_calibration_batches=1, **asked)


def quantized(zygote: Zygote, job: QuantizeJob, checkpoint: Path | None = None) -> Quantization:
    (found,) = zygote.fork(1, partial(quantize_rank, job, checkpoint))
    assert isinstance(found, Quantization)
    return found


def part(found: Quantization, ending: str) -> PartSize:
    (only,) = (one for one in found.parts if one.name.endswith(ending))
    return only


def test_fewer_bits_move_the_model_further(zygote: Zygote) -> None:
    found = [quantized(zygote, job_of("deepseek_v3", format=name)) for name in ("fp8", "nvfp4")]
    assert 0 < found[0].kl_divergence < found[1].kl_divergence
    assert found[0].loss == found[1].loss
    assert found[0].original_bytes == found[1].original_bytes
    assert found[1].num_bytes < found[0].num_bytes < found[0].original_bytes
    assert part(found[0], "linear_kv_down_proj").left_out_because is None


def test_prediction_modules_and_the_output_layer_stay(zygote: Zygote) -> None:
    job = job_of("deepseek_v3", format="fp8")
    recipe = job.plan.recipe.model_copy(update={"num_mtp_layers": 1})
    found = quantized(zygote, job.model_copy(update={"plan": job.plan.model_copy(update={"recipe": recipe})}))
    modules = [one for one in found.parts if one.name.startswith(("mtp.", "output_layer"))]
    assert {one.name.partition(".")[0] for one in modules} == {"mtp", "output_layer"}
    assert all(one.left_out_because and one.num_bytes == one.original_bytes for one in modules)


def test_experts_only_leaves_every_other_weight(zygote: Zygote) -> None:
    found = quantized(zygote, job_of("deepseek_v3", format="mxfp4", experts_only=True))
    changed = {one.name for one in found.parts if one.left_out_because is None}
    assert changed == {f"decoder.layers.*.mlp.experts.local_experts.*.linear_fc{number}" for number in (1, 2)}
    fc1 = part(found, "local_experts.*.linear_fc1")
    assert fc1.num_bytes == fc1.num_params // 2 + fc1.num_params // 32
    assert part(found, "shared_experts.linear_fc1").left_out_because == "not a routed expert"


def test_a_checkpoint_of_stacked_experts_has_the_loss_that_its_training_said(
    tmp_path: Path, zygote: Zygote
) -> None:
    prefix = str(tmp_path / "moby")
    wish = Wish(inputs=(TEXT,), prefix=Path(prefix), documents="paragraph", jsonl_key=None)
    build_dataset(wish, byte_tokenizer(), on_bytes=lambda done, total: None)
    plan = plan_of("qwen3_30b_a3b", scale=ScaleOption.SMOKE, num_gpus=None, changes=[])
    trained = training_job(
        plan, Wishes(data=prefix, num_steps=2, save_every=2, num_validation_batches=1), before=None
    )
    assert trained.plan.recipe.kernels.grouped_gemm
    assert trained.plan.recipe.parallel.expert == 2
    (lines,) = filter(None, zygote.fork(plan.num_ranks, partial(trained_lines, trained, tmp_path)))
    job = quantize_job(
        plan,
        format="fp8",
        experts_only=False,
        data=prefix,
        num_calibration_batches=1,
        num_evaluation_batches=1,
    )
    found = quantized(zygote, job, checkpoint=checkpoint_path(tmp_path / CHECKPOINTS, 2))
    # two layouts sum in another order, in BF16
    assert found.loss == pytest.approx(lines[-1].validation_loss, rel=1e-3)
    assert found.num_tokens == plan_tokens(job)


def plan_tokens(job: QuantizeJob) -> int:
    return job.plan.recipe.global_batch_size * job.plan.recipe.seq_len


def trained_lines(job: TrainingJob, folder: Path, seat: Seat) -> list[LogLine]:
    lines: list[LogLine] = []
    start = Start(checkpoint=None)
    train_rank(job, folder, start, seat.rendezvous, lines.append, lambda line: None, listen_fd=seat.listen_fd)
    return lines
