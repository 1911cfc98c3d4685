"""`check` and Megatron-Core agree on 2,000 layouts and on every example: what is refused, and at which line.

Where Megatron-Core accepts what `check` refuses, the rule stands in BEYOND with the reason. The other way
round there is no exception: whatever Megatron-Core refuses, a broken rule cites the refusing statement.
"""

from __future__ import annotations

from collections import Counter

import pytest

from moe_bench.spec.legality import RULES, legality_problems
from moe_bench.spec.recipe import Recipe
from tests.harness.legality_layouts import layouts
from tests.harness.legality_oracle import (
    ROOT,
    Asked,
    Refusal,
    built_layers,
    counted_layers,
    on_the_machine,
    refusal,
    statements,
)
from tests.spec.examples import Example, examples

NUM_LAYOUTS = 2000
SOURCES = {rule.name: rule.sources for rule in RULES}

IN_A_KERNEL = "a library below Megatron-Core refuses it when the first kernel runs"
AT_FORWARD = "refused where the built layer runs, on tensors"
SILENT = "Megatron-Core leaves it out or switches it without a word"
SILENTLY_WRONG = "Megatron-Core runs it, and what comes out is not what the recipe says"
OURS = "a limit of moe_bench's own kernels, or of its schema"

BEYOND = {
    # rules that Megatron-Core does not state, or only later than the oracle goes
    "heads_per_group": AT_FORWARD,
    "sequence_parts": AT_FORWARD,
    "mla_rotates_pairs": "the harness does not pass the flag on: MLA rotates pairs in any case",
    "torch_native_context": OURS,
    "context_heads": IN_A_KERNEL,
    "context_windows": IN_A_KERNEL,
    "context_sinks": IN_A_KERNEL,
    "layout_stages": "the script reads virtual stages off the layout; a recipe states both",
    "mtp_not_on_the_first_rank": "the layout check misses the last virtual stage of rank 0, and it hangs",
    "mtp_of_the_model": OURS,
    "top_k": AT_FORWARD,
    "routing_groups": AT_FORWARD,
    "sigmoid_renormalises": SILENTLY_WRONG,
    "aux_loss": SILENT,
    "bias_and_expert_loop": AT_FORWARD,
    "bias_and_dropout_fusion": "refused when Transformer Engine's grouped MLP is built",
    "shared_expert_gate": SILENT,
    "capacity": SILENT,
    "probs_on_input": AT_FORWARD,
    "dispatcher_needs_gpus": IN_A_KERNEL,
    "fp32_probabilities": SILENT,
    "deepep_group": IN_A_KERNEL,
    "deepep_nvlink_peers": IN_A_KERNEL,
    "deepep_top_k": IN_A_KERNEL,
    "deepep_hidden_size": IN_A_KERNEL,
    "deepep_sms": IN_A_KERNEL,
    "num_sms": IN_A_KERNEL,
    "hybridep_domains": IN_A_KERNEL,
    "hybridep_tokens": IN_A_KERNEL,
    "hybridep_alignment": IN_A_KERNEL,
    "ncclep_capacity": "asked behind the import of Transformer Engine's NCCL EP",
    "p2p_overlap": SILENT,
    "routing_bias": OURS,
    "format_of_the_gpu": IN_A_KERNEL,
    "format_needs_a_gpu": IN_A_KERNEL,
    "format_needs_transformer_engine": "refused when the grouped MLP of Transformer Engine is built",
    "aligned_widths": IN_A_KERNEL,
    "reuse_grad_buffer": SILENT,
    "quantized_attention": IN_A_KERNEL,
    "torch_native_states": OURS,
    "fp32_gradients": SILENT,
    "aligned_param_gather": SILENT,
    "tensor_overlap_kernels": SILENT,
    "shared_overlap_needs_shared_experts": SILENT,
    "recompute_modules": "Megatron-Core recomputes core_attn where no module is named",
    "recompute_layers": "0 layers are accepted, and recompute nothing",
    "recompute_of_what_is_there": SILENT,
    "offload_kernels": "asked where Transformer Engine is missing",
    "low_precision_options": SILENT,
    "graphs_need_a_gpu": IN_A_KERNEL,
    "graph_kernels": "asked where Transformer Engine is missing",
    "graph_modules": SILENT,
    "graph_of_counting": "the check asks for the deprecated name of pad_routing_map",
    "whole_layers_need_fixed_sizes": IN_A_KERNEL,
    "fsdp_reuse_grad_buffer": SILENT,
    "fsdp_lone_experts": SILENTLY_WRONG,
    "fsdp_overlap": SILENT,
    "op_fuser": "refused when Transformer Engine's grouped MLP is built",
    "accumulation_fusion": SILENT,
}
"""Rules that Megatron-Core does not answer in the oracle, each with the reason."""


def broken_rules(recipe: Recipe) -> set[str]:
    return {problem.rule for problem in legality_problems(recipe)}


def disagreement(broken: set[str], answer: Refusal | None) -> str | None:
    """Why check and Megatron-Core do not say the same; None where they do."""
    if answer is None:
        unnamed = broken - set(BEYOND)
        return f"Megatron-Core accepts what {sorted(unnamed)} refuse" if unnamed else None
    cited = {source for rule in broken for source in SOURCES[rule]}
    if answer.where in cited:
        return None
    return f"{answer.where} refuses ({answer.message}), broken rules are {sorted(broken)}"


def test_check_and_megatron_core_agree_on_2000_layouts() -> None:
    disagreements, answers = [], Counter[str]()
    for name, recipe in layouts(NUM_LAYOUTS):
        broken, answer = broken_rules(recipe), refusal(recipe)
        said = disagreement(broken, answer)
        if said is not None:
            disagreements.append(f"{name}: {said}")
        if answer is None and not broken:
            with on_the_machine(recipe):
                built = built_layers(Asked(recipe))
            if built != counted_layers(recipe):
                disagreements.append(f"{name}: stages hold {built}, counted {counted_layers(recipe)}")
        answers["legal" if not broken else "refused" if answer else "beyond"] += 1
    assert not disagreements, "\n".join(disagreements[:10])
    # a generator that drew only one kind would prove nothing
    assert min(answers["legal"], answers["refused"]) > NUM_LAYOUTS // 5


@pytest.mark.parametrize("example", examples(), ids=str)
def test_megatron_core_refuses_each_example_at_the_cited_line(example: Example) -> None:
    answer = refusal(example.broken())
    if answer is None:
        assert example.rule in BEYOND
    else:
        assert answer.where in SOURCES[example.rule], answer.message


@pytest.mark.parametrize("example", examples(), ids=str)
def test_megatron_core_accepts_each_cured_example(example: Example) -> None:
    assert refusal(example.cured()) is None


def test_every_rule_beyond_the_oracle_is_needed() -> None:
    """A rule leaves BEYOND as soon as Megatron-Core refuses all its examples itself."""
    reached = {
        rule: all(refusal(example.broken()) for example in examples() if example.rule == rule)
        for rule in BEYOND
    }
    assert [rule for rule, is_reached in reached.items() if is_reached] == []


MEGATRON_SOURCES = sorted({source for sources in SOURCES.values() for source in sources if ".py:" in source})


@pytest.mark.parametrize("source", [source for source in MEGATRON_SOURCES if source.startswith("megatron/")])
def test_a_cited_line_begins_a_statement_of_the_supported_release(source: str) -> None:
    path, _, line = source.rpartition(":")
    assert int(line) in {first for first, _, _ in statements(ROOT / path)}
