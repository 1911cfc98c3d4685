"""Text that a checkpoint goes on with: the recipe's own forward pass over all that is there, token by token.

Megatron-Core's inference engines need a GPU (text_generation_controller.py makes CUDA streams and events) and
kernels of their own; this is the model that was trained, in the layout and with the kernels of its recipe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from moe_bench.errors import BadInputError
from moe_bench.harness.all_ranks import Place, on_all_ranks
from moe_bench.harness.batches import MicroBatch, step_batches
from moe_bench.harness.data.tokenizer import Tokenizer
from moe_bench.harness.training.loaded import OTHER_LAYOUT, Loaded, loaded, told_by_one
from moe_bench.results.evaluation import Generation
from moe_bench.spec.derive_training import require_vocabulary
from moe_bench.spec.recipe import Recipe
from moe_bench.spec.rendezvous import Rendezvous
from moe_bench.spec.sampling import Sampling
from moe_bench.spec.scale import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What is to be gone on with, and by whom."""

    plan: Plan
    checkpoint: Path
    text: str
    max_new_tokens: int
    sampling: Sampling


def generate(prompt: Prompt, tokenizer: Tokenizer, *, rendezvous: Rendezvous | None) -> Generation:
    """Go on with a text until the model ends it, or as many tokens as were asked for.

    Of a text longer than the recipe's sequences the model sees the end.

    Raises BadInputError where checkpoint, tokenizer and recipe do not fit, where the prompt has no token, and
    for a recipe whose choice of experts depends on other tokens than those before.
    """
    recipe = prompt.plan.recipe
    require_vocabulary(prompt.plan, tokenizer.spec, "--tokenizer")
    _require_causal(recipe)
    ids = tokenizer.encode(prompt.text)
    if not ids:
        raise BadInputError("--prompt: no token in it; say something to go on with")
    work = partial(_generate_rank, prompt, tokenizer, ids)
    return on_all_ranks(recipe, work, rendezvous=rendezvous, remedy=OTHER_LAYOUT)


def _require_causal(recipe: Recipe) -> None:
    """What fills up a sequence behind the text must change nothing in it.

    Not `require_causal` of comparisons, which asks of training: evaluated, Sinkhorn's choice is plain top-k,
    and a capacity by position is refused here too, since it counts what fills up the batch.
    """
    if recipe.model.moe is not None and recipe.model.moe.router.choice == "expert_choice":
        raise BadInputError(
            f"{recipe.name}: with expert_choice an expert sees the tokens that are still to come; such a "
            "model can be evaluated and cannot go on with a text"
        )
    if recipe.token_drop is not None:
        raise BadInputError(
            "token_drop: what an expert keeps of a text depends on what fills up the batch; generate with "
            "--set token_drop=null"
        )


def _generate_rank(prompt: Prompt, tokenizer: Tokenizer, ids: Sequence[int], place: Place) -> Generation:
    with loaded(prompt.plan.recipe, prompt.checkpoint, place) as model:
        new: list[int] = []
        end = tokenizer.spec.end_of_document
        for token in _tokens(model, ids, prompt, vocab_size=tokenizer.spec.vocab_size):
            new.append(token)
            if token == end:
                break
        said = [token for token in new if token != end]
        return Generation(
            recipe=prompt.plan.recipe.name,
            checkpoint=str(prompt.checkpoint),
            num_steps=model.num_steps,
            prompt=prompt.text,
            text=tokenizer.decode(said),
            tokens=tuple(said),
            has_ended=len(said) < len(new),
        )


def _tokens(model: Loaded, ids: Sequence[int], prompt: Prompt, *, vocab_size: int) -> Iterator[int]:
    """New tokens, the same on all ranks. A collective call of all ranks for each."""
    generator = torch.Generator().manual_seed(prompt.sampling.seed)
    seen = list(ids)
    for _ in range(prompt.max_new_tokens):
        logits = _next_logits(model, seen[-model.plan.seq_len :])
        mine = None if logits is None else chosen(logits[:vocab_size], prompt.sampling, generator)
        token = int(told_by_one(mine if _speaks() else None))
        seen.append(token)
        yield token


def chosen(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One of the tokens that float [tokens] scores; of equals the first at temperature 0."""
    scores = logits.float().cpu()
    if sampling.temperature == 0:
        return int(scores.argmax())
    if sampling.top_k is not None and sampling.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[-1], float("-inf"))
    probabilities = torch.softmax(scores / sampling.temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _speaks() -> bool:
    """Whether this is one rank of those that have the same logits."""
    return bool(
        parallel_state.get_data_parallel_rank() == 0 and parallel_state.get_tensor_model_parallel_rank() == 0
    )


@torch.no_grad()  # type: ignore[untyped-decorator]
def _next_logits(model: Loaded, seen: Sequence[int]) -> torch.Tensor | None:
    """Of what follows `seen`: [vocabulary]; None but on the ranks that end the pipeline and hold that place.

    Every micro batch of every rank is the same text, filled up to the shape that the recipe trains with, so
    that kernels and graphs meet no other. The schedule with virtual stages wants as many as there are stages.
    """
    chunks = list(model.model.chunks)
    num_stages = parallel_state.get_pipeline_model_parallel_world_size()
    num_micro_batches = num_stages if len(chunks) > 1 else 1
    plan = replace(model.plan, num_micro_batches=num_micro_batches)
    tokens = torch.tensor(seen)
    batches = step_batches(plan, 0, draw=lambda index: tokens)
    for chunk in chunks:
        chunk.eval()
    iterators = [iter(batches) for _ in chunks]
    found: list[torch.Tensor | None] = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, position=len(seen) - 1),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=chunks,
        num_microbatches=num_micro_batches,
        seq_length=plan.seq_len,
        micro_batch_size=plan.micro_batch_size,
        forward_only=True,
        collect_non_loss_data=True,
    )
    local = found[0] if found else None
    return None if local is None else gather_from_tensor_model_parallel_region(local)


def _forward_step(micro_batches: Iterator[MicroBatch], model: Any, *, position: int) -> tuple[Any, Any]:
    batch = next(micro_batches)
    output = model(batch["tokens"], batch["position_ids"], None)
    return output, partial(_logits_at, batch["position_ids"][0], position)


def _logits_at(
    position_ids: torch.Tensor, position: int, logits: torch.Tensor, *, non_loss_data: bool
) -> torch.Tensor | None:
    """Of [sequences, positions, vocabulary / TP] those at `position`, which one of the context ranks has."""
    (places,) = torch.nonzero(position_ids == position, as_tuple=True)
    return logits[0, int(places[0])] if len(places) else None
