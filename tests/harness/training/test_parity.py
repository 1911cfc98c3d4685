"""Toys whose layouts learn alike, and toys that do not."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from moe_bench.cli.options import ScaleOption, plan_of
from moe_bench.cli.parity_ranks import learn_by, starter_by
from moe_bench.errors import MissingRequirementError
from moe_bench.harness.batches import MicroBatch
from moe_bench.harness.build import Training
from moe_bench.harness.data.build import Wish, build_dataset
from moe_bench.harness.data.tokenizer import byte_tokenizer
from moe_bench.harness.step import StepOutcome, train_step
from moe_bench.harness.training import program
from moe_bench.harness.training.parity import ParityCase, Trained, compare_losses, learn_as_rank, learn_here
from moe_bench.results.parity import Learned, Parity
from moe_bench.spec.catalogue import recipes_root
from moe_bench.spec.derive_parity import plain_plan
from moe_bench.spec.derive_training import Wishes, training_job
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Recompute
from moe_bench.spec.rendezvous import Rendezvous
from moe_bench.spec.training import ComparedRun, Nudge, TrainingJob
from tests.harness.zygote import Zygote

TEXT = Path(__file__).parents[2] / "data" / "moby_dick.txt"
FP32 = ("precision=fp32", "optimizer.gradient_dtype=fp32", "overlap.expert_parallel=false")
SPREAD = (
    "parallel.tensor=2",
    "parallel.sequence_parallel=true",
    'env.CUDA_DEVICE_MAX_CONNECTIONS="1"',
)
FSDP = (
    "parallel.data_sharding=megatron_fsdp",
    "parallel.fsdp_strategy=optim",
    'env.CUDA_DEVICE_MAX_CONNECTIONS="8"',
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
        learn=learn_here,
        trained=Trained(),
    )


def test_another_layout_learns_alike(prefix: Path, zygote: Zygote) -> None:
    found: Parity = zygote.call(compared, prefix, SPREAD)
    assert found.is_equal
    # repeats did start from other weights, by no more than a rounding
    assert any(repeat != found.base.learned for repeat in found.repeats)
    assert [curve.name for curve in found.curves] == ["loss", "gradient norm"]
    assert all(max(curve.tolerance_values) < 1e-3 for curve in found.curves)


def with_recipe(job: TrainingJob, **changes: object) -> TrainingJob:
    recipe = job.plan.recipe.model_copy(update=changes)
    return job.model_copy(update={"plan": job.plan.model_copy(update={"recipe": recipe})})


def alone(job: TrainingJob) -> TrainingJob:
    """On one process, plainly."""
    return job.model_copy(update={"plan": plain_plan(job.plan)})


NUDGE = Nudge(roundoff_fraction=2.0**-8, seed=3)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def learned_twice(run: ComparedRun, folder: Path) -> list[Learned | None]:
    """By a rank that is forked, and by one that was started with its place in the job."""
    place = Rendezvous(rank=0, world_size=1, local_rank=0, master_addr="127.0.0.1", master_port=free_port())
    found = learn_here(run), learn_as_rank(run, folder, place)
    return [one if one is None else one.learned for one in found]


def test_a_rank_that_a_launcher_started_learns_what_a_forked_one_does(
    prefix: Path, tmp_path: Path, zygote: Zygote
) -> None:
    run = ComparedRun(job=alone(job(prefix, ScaleOption.SMOKE)), nudge=NUDGE)
    forked, started = zygote.call(learned_twice, run, tmp_path)
    assert forked == started
    assert forked is not None


@pytest.mark.slow
def test_ranks_of_torchrun_learn_what_forked_ones_do(prefix: Path, tmp_path: Path, zygote: Zygote) -> None:
    run = ComparedRun(job=job(prefix, ScaleOption.SMOKE, *SPREAD), nudge=NUDGE)
    found = learn_by(starter_by("torchrun"), tmp_path)(run)
    assert found == zygote.call(learn_here, run)
    assert found.gpu is None
    assert list(tmp_path.iterdir()) == []


def on_this_gpu(prefix: Path, recompute: Recompute) -> TrainingJob:
    """The toy on one GPU of this machine, with kernels of torch."""
    loader = Loader(root=recipes_root())
    systems = [loader.system(path.stem) for path in sorted((recipes_root() / "systems").glob("*.yaml"))]
    name = torch.cuda.get_device_name()
    mine = [one for one in systems if one.gpu is not None and one.gpu.device_name == name]
    if not mine:
        pytest.skip(f"no file of recipes/systems names {name}")
    return with_recipe(alone(job(prefix, ScaleOption.SMOKE)), system=mine[0], recompute=recompute)


@pytest.mark.gpu("ranks that meet over NCCL need a GPU each")
def test_another_recompute_learns_alike_on_a_gpu(prefix: Path, tmp_path: Path) -> None:
    full = Recompute(granularity="full", method="uniform", num_layers=1)
    found = compare_losses(
        ParityCase(
            base=on_this_gpu(prefix, Recompute()),
            variant=on_this_gpu(prefix, full),
            varied=("recompute=full",),
            num_repeats=2,
        ),
        environment={},
        command=("test",),
        source_root=prefix.parent,
        on_run=lambda name: None,
        learn=learn_by(starter_by("torchrun"), tmp_path),
        trained=Trained(),
    )
    assert found.is_equal
    assert found.base.gpu is not None
    assert found.base.gpu.name == torch.cuda.get_device_name()


@pytest.mark.slow
def test_megatron_fsdp_learns_alike(prefix: Path, zygote: Zygote) -> None:
    found: Parity = zygote.call(compared, prefix, FSDP)
    assert found.is_equal


@pytest.mark.slow
@pytest.mark.parametrize("change", ["optimizer.learning_rate=0.003", "seed=7"])
def test_another_rate_or_seed_does_not(change: str, prefix: Path, zygote: Zygote) -> None:
    found: Parity = zygote.call(compared, prefix, (change,))
    # the first loss and norm are taken before any rate matters
    steps = {curve.first_different_step for curve in found.curves}
    assert steps == ({1} if change.startswith("seed") else {2})


def test_ranks_on_gpus_are_not_forked(prefix: Path) -> None:
    on_gpus = with_recipe(
        job(prefix, ScaleOption.SMOKE), system=Loader(root=recipes_root()).system("h100_sxm")
    )
    with pytest.raises(MissingRequirementError, match="2 GPU ranks need a launcher"):
        learn_here(ComparedRun(job=on_gpus))


def compared_with_doubled_gradients(prefix: Path) -> Parity:
    """The same job twice, the second time with gradients that are twice what they should be."""
    is_variant = False

    def doubling(built: Training, batches: list[MicroBatch]) -> StepOutcome:
        step = built.optimizer.step

        def doubled() -> object:
            for chunk in built.chunks:
                for parameter in chunk.parameters():
                    parameter.main_grad.mul_(2)
            return step()

        with pytest.MonkeyPatch.context() as patch:
            if is_variant:
                patch.setattr(built.optimizer, "step", doubled)
            return train_step(built, batches)

    def on_run(name: str) -> None:
        nonlocal is_variant
        is_variant = name == "variant"

    one = job(prefix, ScaleOption.SMOKE)
    case = ParityCase(base=one, variant=one, varied=("gradients=2",), num_repeats=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "train_step", doubling)
        return compare_losses(
            case,
            environment={},
            command=(),
            source_root=prefix.parent,
            on_run=on_run,
            learn=learn_here,
            trained=Trained(),
        )


@pytest.mark.slow
def test_gradients_that_are_wrong_by_a_factor_show_in_their_norm_alone(prefix: Path, zygote: Zygote) -> None:
    found: Parity = zygote.call(compared_with_doubled_gradients, prefix)
    # Adam divides the factor out, and clipping to a norm of one has done so before
    assert [curve.first_different_step for curve in found.curves] == [None, 1]
    assert found.variant.learned.grad_norms[0] == pytest.approx(2 * found.base.learned.grad_norms[0])
