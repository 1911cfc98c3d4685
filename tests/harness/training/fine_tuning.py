"""What tests of fine-tuning share: a model of Hugging Face's class, a run, what transformers says of it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_bench.checkpoints.family import family_of
from moe_bench.cli.options import ScaleOption, plan_of
from moe_bench.harness.data.build import Wish, build_dataset
from moe_bench.harness.data.tokenizer import byte_tokenizer
from moe_bench.spec.derive_training import Wishes, training_job
from moe_bench.spec.training import TrainingJob

TEXT = Path(__file__).parents[2] / "data" / "moby_dick.txt"
FP32 = (
    "precision=fp32",
    "optimizer.gradient_dtype=fp32",
    "overlap.expert_parallel=false",
    "optimizer.learning_rate=0.003",
)
NUM_STEPS = 8


def byte_dataset(prefix: Path) -> Path:
    """The text, a paragraph a document."""
    wish = Wish(inputs=(TEXT,), prefix=prefix, documents="paragraph", jsonl_key=None)
    build_dataset(wish, byte_tokenizer(), on_bytes=lambda done, total: None)
    return prefix


def fine_tuning(
    prefix: Path, recipe: str, *changes: str, lora_rank: int | None = None, save_every: int = NUM_STEPS
) -> TrainingJob:
    """A run in FP32 at smoke scale."""
    plan = plan_of(recipe, scale=ScaleOption.SMOKE, num_gpus=None, changes=[*FP32, *changes])
    wishes = Wishes(
        data=str(prefix), num_steps=NUM_STEPS, save_every=save_every, validate_every=NUM_STEPS,
        num_validation_batches=1, lora_rank=lora_rank,
    )  # fmt: skip
    return training_job(plan, wishes, before=None)


def write_random(job: TrainingJob, folder: Path) -> None:
    """What `save_pretrained` makes of a fresh model of the recipe's class."""
    model = job.plan.recipe.model
    stated = family_of(model).config(model)
    config = AutoConfig.for_model(**{key: value for key, value in stated.items() if key != "architectures"})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def loss_by_transformers(folder: Path, samples: list[dict[str, torch.Tensor]]) -> float:
    """Of a checkpoint on samples of a dataset, by Hugging Face's class in FP32."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens, labels = (torch.stack([sample[key] for sample in samples]) for key in ("tokens", "labels"))
    with torch.no_grad():
        logits = network(tokens, use_cache=False).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))
