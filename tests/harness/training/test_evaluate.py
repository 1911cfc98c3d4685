"""A converted checkpoint is evaluated and goes on with text: the same in every layout."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_bench.checkpoints.family import family_of
from moe_bench.checkpoints.safetensors_folder import logical_tensors
from moe_bench.errors import BadInputError
from moe_bench.harness.convert.convert import convert_to_megatron
from moe_bench.harness.data.build import Wish, build_dataset
from moe_bench.harness.data.tokenizer import byte_tokenizer
from moe_bench.harness.training.evaluate import Question, Stream, evaluate, read_stream
from moe_bench.harness.training.generate import Prompt, chosen, generate
from moe_bench.results.evaluation import Evaluation, Generation
from moe_bench.spec.recipe import Recipe, TokenDrop
from moe_bench.spec.sampling import Sampling
from moe_bench.spec.scale import Plan
from tests.harness.convert.checkpoints import random_tensors, rules_of, toy_of, write_folder
from tests.harness.zygote import Zygote

# Megatron-Core wonders about its rank, of which a test has none
pytestmark = pytest.mark.filterwarnings("ignore:Could not determine rank")

MODEL = "qwen3_30b_a3b"
TEXT = Path(__file__).parents[2] / "data" / "moby_dick.txt"
NUM_BYTES = 6000


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "start.txt").write_bytes(TEXT.read_bytes()[:NUM_BYTES])
    wish = Wish(
        inputs=(folder / "start.txt",), prefix=folder / "start", documents="paragraph", jsonl_key=None
    )
    build_dataset(wish, byte_tokenizer(), on_bytes=lambda done, total: None)
    return folder / "start"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights from Hugging Face's format, small enough that no probability is 1."""
    folder, recipe = tmp_path_factory.mktemp("weights"), toy()
    rules = rules_of(recipe)
    tensors = {name: 0.2 * value for name, value in random_tensors(rules).items()}
    write_folder(folder / "theirs", tensors, family_of(recipe.model).config(recipe.model))
    found = logical_tensors(folder / "theirs")
    convert_to_megatron(rules, found, folder / "ours", on_tensor=lambda rule: None)
    return folder / "ours"


def toy() -> Recipe:
    """One process in FP32, with a token for each byte and more."""
    small = toy_of(MODEL)
    return small.model_copy(update={"model": small.model.model_copy(update={"vocab_size": 512})})


LAYOUTS: dict[str, dict[str, Any]] = {
    "1 process": {},
    "TP2 x EP2": {"num_gpus": 2, "tensor": 2, "expert": 2, "sequence_parallel": True},
    "PP2": {"num_gpus": 2, "pipeline": 2},
    "CP2": {"num_gpus": 2, "context": 2, "context_comm": "allgather"},
    "PP2 x CP2 x EP2": {
        "num_gpus": 4, "pipeline": 2, "context": 2, "context_comm": "allgather", "expert": 2,
    },
}  # fmt: skip


def plan(layout: str) -> Plan:
    one = toy()
    parallel = one.parallel.model_copy(update=LAYOUTS[layout])
    return as_plan(one.model_copy(update={"parallel": parallel}))


IN_EVERY_LAYOUT = pytest.mark.parametrize(
    "layout",
    ["TP2 x EP2", "PP2", "CP2", pytest.param("PP2 x CP2 x EP2", marks=pytest.mark.slow)],
)


def as_plan(recipe: Recipe) -> Plan:
    return Plan(recipe=recipe, asked=recipe.name, scale="smoke")


def evaluated(zygote: Zygote, plan: Plan, checkpoint: Path, prefix: Path) -> Evaluation:
    question = Question(plan=plan, checkpoint=checkpoint, data=str(prefix), held_out_fraction=None)
    found: Evaluation = zygote.call(partial(evaluate, rendezvous=None), question)
    return found


def generated(
    zygote: Zygote, plan: Plan, checkpoint: Path, sampling: Sampling, text: str = "Call me "
) -> Generation:
    prompt = Prompt(plan=plan, checkpoint=checkpoint, text=text, max_new_tokens=8, sampling=sampling)
    found: Generation = zygote.call(generate_bytes, prompt)
    return found


def generate_bytes(prompt: Prompt) -> Generation:
    return generate(prompt, byte_tokenizer(), rendezvous=None)


@pytest.fixture(scope="module")
def alone(zygote: Zygote, converted: Path, prefix: Path) -> Evaluation:
    return evaluated(zygote, plan("1 process"), converted, prefix)


@IN_EVERY_LAYOUT
def test_the_loss_is_that_of_one_process(
    zygote: Zygote, converted: Path, prefix: Path, alone: Evaluation, layout: str
) -> None:
    spread = evaluated(zygote, plan(layout), converted, prefix)
    assert spread.num_tokens == alone.num_tokens == read_stream(str(prefix), None).num_tokens - 1
    assert spread.loss == pytest.approx(alone.loss, rel=1e-5)
    assert alone.num_steps == 0


def test_a_capacity_of_evaluation_counts_and_that_of_training_does_not(
    zygote: Zygote, converted: Path, prefix: Path, alone: Evaluation
) -> None:
    drops = [
        TokenDrop(capacity_factor=train, eval_capacity_factor=factor)
        for train, factor in ((0.1, 100.0), (100.0, 0.1))
    ]
    wide, narrow = (
        evaluated(zygote, as_plan(toy().model_copy(update={"token_drop": drop})), converted, prefix).loss
        for drop in drops
    )
    assert wide == pytest.approx(alone.loss, rel=1e-6)
    assert narrow != pytest.approx(alone.loss, rel=1e-3)


def test_every_token_but_the_first_is_a_label_once(prefix: Path) -> None:
    stream = read_stream(str(prefix), None)
    sequences = [stream.sequence(index, length=64) for index in range(stream.num_tokens // 64 + 2)]
    assert len(sequences[-1]) == 0
    labels = torch.cat([sequence[1:] for sequence in sequences])
    assert labels.tolist() == stream.sequence(0, length=stream.num_tokens)[1:].tolist()


def test_what_was_held_out_is_the_end_of_the_text(prefix: Path) -> None:
    whole, end = read_stream(str(prefix), None), read_stream(str(prefix), 0.25)

    def tokens(stream: Stream) -> list[int]:
        return list(stream.sequence(0, length=stream.num_tokens).tolist())

    assert end.num_documents == round(whole.num_documents * 0.25)
    assert tokens(whole)[-end.num_tokens :] == tokens(end)


@pytest.fixture(scope="module")
def told_alone(zygote: Zygote, converted: Path) -> Generation:
    return generated(zygote, plan("1 process"), converted, Sampling())


@IN_EVERY_LAYOUT
def test_the_likeliest_text_is_that_of_one_process(
    zygote: Zygote, converted: Path, told_alone: Generation, layout: str
) -> None:
    assert told_alone.tokens == generated(zygote, plan(layout), converted, Sampling()).tokens
    assert len(told_alone.tokens) == 8 or told_alone.has_ended


def test_what_is_drawn_depends_on_the_seed_alone_and_a_prompt_may_be_longer_than_a_sequence(
    zygote: Zygote, converted: Path
) -> None:
    text = TEXT.read_text()[:500]
    first, again, other = (
        generated(zygote, plan("1 process"), converted, Sampling(temperature=1.0, seed=seed), text).tokens
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_tokens_are_drawn_from_the_likeliest() -> None:
    logits, generator = torch.tensor([0.0, 3.0, 1.0, 2.0]), torch.Generator().manual_seed(0)
    assert chosen(logits, Sampling(), generator) == 1
    drawn = {chosen(logits, Sampling(temperature=5.0, top_k=2), generator) for _ in range(50)}
    assert drawn == {1, 3}
    assert {chosen(logits, Sampling(temperature=5.0), generator) for _ in range(200)} == {0, 1, 2, 3}


def test_a_recipe_that_drops_tokens_goes_on_with_no_text(converted: Path) -> None:
    dropping = toy().model_copy(update={"token_drop": TokenDrop(capacity_factor=1.0)})
    prompt = Prompt(
        plan=as_plan(dropping), checkpoint=converted, text="a", max_new_tokens=1, sampling=Sampling()
    )
    with pytest.raises(BadInputError, match="--set token_drop=null"):
        generate_bytes(prompt)
    with pytest.raises(BadInputError, match="no token in it"):
        generate_bytes(replace(prompt, plan=plan("1 process"), text=""))
