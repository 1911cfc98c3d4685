"""Model FLOPs of one pipeline stage: what its layers, MTP modules and LM head add to the count of a step."""

from __future__ import annotations

from collections import Counter

from moe_bench.analysis.flops import (
    RULES,
    FlopsCounting,
    as_counted,
    latent_width,
    layer_flops,
    lm_head_flops,
    norm_flops_as_product,
)
from moe_bench.analysis.projection_flops import mtp_projection_flops
from moe_bench.spec.recipe import Recipe


def stage_flops(recipe: Recipe, pipeline_rank: int, *, counting: FlopsCounting) -> int:
    """FLOPs of one optimizer step over all ranks of pipeline rank `pipeline_rank`: 3 times the forward pass.

    The parts of `flops.step_flops`, each where its weights stand, so the stages of a recipe sum to it.
    Recomputation is left out. Raises LayoutError as `Recipe.chunks`.
    """
    rule = RULES[counting]
    model = as_counted(recipe.model, rule)
    num_seqs, seq_len = recipe.global_batch_size, recipe.seq_len
    tokens, hidden = num_seqs * seq_len, model.hidden_size
    own = [chunk for chunk in recipe.chunks() if chunk.pipeline_rank == pipeline_rank]
    num_layers = sum(len(chunk.layers) for chunk in own)
    num_mtp = sum(chunk.num_mtp_layers for chunk in own) if rule.mtp else 0
    structures = Counter(model.layer(layer) for chunk in own for layer in chunk.layers)
    structures.update(model.mtp_layers * num_mtp)
    forward = sum(
        number * sum(layer_flops(model, structure, num_seqs=num_seqs, seq_len=seq_len, rule=rule).values())
        for structure, number in structures.items()
    )
    if any(chunk.has_loss for chunk in own):
        num_heads = 1 + (recipe.num_mtp_layers if rule.mtp else 0)
        forward += num_heads * lm_head_flops(tokens=tokens, hidden=hidden, vocab_size=model.vocab_size)
    if model.hybrid_pattern is None:
        forward += num_mtp * mtp_projection_flops(tokens=tokens, hidden=hidden)
        width = (num_layers + num_mtp) * latent_width(model) + num_mtp * 3 * hidden
        forward += rule.latent_norms * norm_flops_as_product(tokens=tokens, width=width)
    return 3 * forward
