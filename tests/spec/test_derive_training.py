"""What a training run is made of: defaults, what was said before, what contradicts itself."""

from __future__ import annotations

import pytest
from typer.main import get_command

from moe_bench.cli import app_with
from moe_bench.cli.options import ScaleOption, plan_of
from moe_bench.errors import BadInputError
from moe_bench.spec.dataset import TokenizerSpec
from moe_bench.spec.derive_training import (
    TOY_BATCH_SIZE,
    Wishes,
    require_checkpoints,
    require_same_tokenizer,
    require_vocabulary,
    training_job,
)
from moe_bench.spec.scale import Plan
from moe_bench.spec.training import Asked


def plan(*changes: str, name: str = "qwen3_30b_a3b") -> Plan:
    return plan_of(name, scale=ScaleOption.SMOKE, num_gpus=None, changes=list(changes))


def test_a_router_is_set_free_and_that_is_listed() -> None:
    job = training_job(plan(), Wishes(data="set"), before=None)
    assert job.plan.recipe.routing.mode == "natural"
    (row,) = [row for row in job.plan.substitutions if row.field == "routing"]
    assert (row.asked, row.used) == ("random_logits", "natural")


def test_a_toys_batch_is_the_same_in_every_layout() -> None:
    layouts = (
        [],
        ["parallel.tensor=2", "parallel.sequence_parallel=true", 'env.CUDA_DEVICE_MAX_CONNECTIONS="1"'],
    )
    for changes in layouts:
        recipe = training_job(plan(*changes), Wishes(data="set"), before=None).plan.recipe
        assert recipe.global_batch_size == TOY_BATCH_SIZE


def test_defaults_follow_the_number_of_steps() -> None:
    job = training_job(plan(), Wishes(data="set", num_steps=200), before=None)
    assert job.learning_rate.num_warmup_steps == 2
    assert job.learning_rate.num_decay_steps == 200
    assert job.validation.every_steps == job.checkpoints.every_steps == 20


def test_the_help_of_train_names_the_defaults() -> None:
    job = training_job(plan(), Wishes(data="set"), before=None)
    defaults = {
        "--steps": job.num_steps,
        "--min-lr-fraction": job.learning_rate.minimum_fraction,
        "--expert-lr-factor": f"{job.learning_rate.expert_factor:g}",
        "--valid-fraction": job.validation_fraction,
        "--valid-batches": job.validation.num_batches,
        "--keep": job.checkpoints.num_kept,
    }
    options = {name: one for one in get_command(app_with()).commands["train"].params for name in one.opts}
    for name, value in defaults.items():
        assert options[name].help.endswith(f"; {value}."), name


def test_what_was_said_before_holds_until_it_is_said_anew() -> None:
    before = training_job(
        plan(), Wishes(data="set", num_steps=50, num_kept=7, expert_factor=0.5), before=None
    )
    job = training_job(plan(), Wishes(num_steps=80), before=before)
    assert (job.data, job.num_steps, job.checkpoints.num_kept) == ("set", 80, 7)
    assert job.learning_rate == before.learning_rate


@pytest.mark.parametrize(
    ("wishes", "problem"),
    [
        (Wishes(data="set", num_warmup_steps=9, num_decay_steps=9), "9 warm-up steps leave nothing of 9"),
        (Wishes(data="set", validation_fraction=1.5), "less than or equal to 1"),
    ],
)
def test_what_contradicts_itself_is_refused(wishes: Wishes, problem: str) -> None:
    with pytest.raises(BadInputError, match=problem):
        training_job(plan(), wishes, before=None)


def test_a_run_of_another_recipe_is_not_gone_on_with() -> None:
    before = training_job(plan(), Wishes(data="set"), before=None)
    with pytest.raises(BadInputError, match="the run in the folder is one of qwen3_30b_a3b"):
        training_job(plan(name="mixtral_8x7b"), Wishes(), before=before)


def test_tokens_that_the_model_does_not_know_are_refused() -> None:
    tokenizer = TokenizerSpec(kind="bytes", vocab_size=513, end_of_document=256)
    with pytest.raises(BadInputError, match=r"has 513 tokens and qwen3_30b_a3b knows 512"):
        require_vocabulary(plan(), tokenizer, "set")


def test_a_run_of_a_recipe_whose_changes_name_it_anew_goes_on() -> None:
    asked = Asked(recipe="qwen3_30b_a3b/h100_sxm_16g_bf16", scale="smoke")
    before = training_job(plan(), Wishes(data="set"), before=None, asked=asked)
    larger = plan("parallel.num_gpus=32")
    assert larger.asked != before.plan.asked
    again = asked.model_copy(update={"changes": larger.modified})
    assert training_job(larger, Wishes(), before=before, asked=again).asked == again


def test_adapters_beside_weights_with_which_they_were_not_tried_are_refused() -> None:
    asked = plan()
    sharded = asked.recipe.parallel.model_copy(update={"data_sharding": "megatron_fsdp"})
    recipe = asked.recipe.model_copy(update={"parallel": sharded})
    with pytest.raises(BadInputError, match="Megatron-FSDP"):
        training_job(
            asked.model_copy(update={"recipe": recipe}), Wishes(data="set", lora_rank=4), before=None
        )


def test_several_optimizer_instances_of_megatron_fsdp_cannot_be_saved() -> None:
    recipe = plan().recipe
    sharded = recipe.parallel.model_copy(update={"data_sharding": "megatron_fsdp"})
    require_checkpoints(recipe.model_copy(update={"parallel": sharded}))
    several = sharded.model_copy(update={"num_optimizer_instances": 2})
    with pytest.raises(BadInputError, match=r"add --set parallel\.num_optimizer_instances=1"):
        require_checkpoints(recipe.model_copy(update={"parallel": several}))


def test_another_tokenizer_than_the_run_has_learned_is_refused_wherever_its_files_lie() -> None:
    learned = TokenizerSpec(kind="huggingface", path="/a", fingerprint="f", vocab_size=300, end_of_document=0)
    fresh = training_job(plan(), Wishes(data="set"), before=None)
    job = fresh.model_copy(update={"tokenizer": learned})
    require_same_tokenizer(job, learned.model_copy(update={"path": "/b"}), "set")
    require_same_tokenizer(fresh, learned, "set")
    assert training_job(plan(), Wishes(), before=job).tokenizer == learned
    with pytest.raises(BadInputError, match="set: a tokenizer of 300 tokens"):
        require_same_tokenizer(job, learned.model_copy(update={"fingerprint": "g"}), "set")
