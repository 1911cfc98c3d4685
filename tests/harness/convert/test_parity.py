"""Every shipped model is Hugging Face's on one process and on two, and every fact shows in the proof."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from moe_bench.errors import BadInputError
from moe_bench.harness.convert.parity import ParityCase
from moe_bench.harness.convert.verify import layout_proof, rules_of, run_parity, verify
from moe_bench.results.verification import LayoutProof, Verification
from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.derive_verify import VerifyLayout, verify_recipe
from moe_bench.spec.legality import legality_problems
from moe_bench.spec.load import Loader
from moe_bench.spec.model import ModelSpec
from tests.harness.zygote import Zygote

LOADER = Loader(root=recipes_root())
STRUCTURES = (
    "deepseek_v2_lite",
    "deepseek_v3",
    "glm_4_5_air",
    "gpt_oss_20b",
    "kimi_k2",
    "mixtral_8x7b",
    "moonlight_16b_a3b",
    "olmoe_1b_7b",
    "qwen3_30b_a3b",
)
"""One of each toy; the other models have the structure of one of these."""
IN_CI = {"deepseek_v3", "gpt_oss_20b", "olmoe_1b_7b"}
"""Over two processes: latent attention with prediction modules, biases and sinks, norms over all heads."""


def case_of(key: str, layout: VerifyLayout = "1 process") -> ParityCase:
    asked = LOADER.recipe(find_recipe(key, LOADER))
    toy = verify_recipe(asked, host=LOADER.system("cpu_host"), layout=layout)
    assert list(legality_problems(toy)) == []
    return ParityCase(recipe=toy, model=toy.model, rules=rules_of(toy))


def proof_of(zygote: Zygote, case: ParityCase, layout: VerifyLayout = "1 process") -> LayoutProof:
    return layout_proof(layout, zygote.call(run_parity, case))


@pytest.mark.parametrize("key", STRUCTURES)
def test_logits_and_gradients_are_those_of_hugging_face(key: str, zygote: Zygote) -> None:
    proof = proof_of(zygote, case_of(key))
    assert proof.is_equal, proof.worst_gradient
    assert proof.loss == pytest.approx(proof.reference_loss, abs=1e-5)


@pytest.mark.parametrize(
    "key", [key if key in IN_CI else pytest.param(key, marks=pytest.mark.slow) for key in STRUCTURES]
)
def test_they_are_under_tensor_and_expert_parallelism(key: str, zygote: Zygote) -> None:
    proof = proof_of(zygote, case_of(key, "TP2 x EP2"), "TP2 x EP2")
    assert proof.num_processes == 2
    assert proof.is_equal, proof.worst_gradient


def set_in(*path: str, to: Any) -> Callable[[ModelSpec], ModelSpec]:
    """A change of one fact of a model."""

    def change(node: Any, path: tuple[str, ...]) -> Any:
        name, *rest = path
        value = change(getattr(node, name), tuple(rest)) if rest else to
        return node.model_copy(update={name: value})

    return lambda model: change(model, path)


FACTS = (
    ("deepseek_v3", set_in("rope", "scaling", "mscale_all_dim_factor", to=0.9)),
    ("deepseek_v3", set_in("moe", "router", "groups_per_token", to=1)),
    ("deepseek_v3", set_in("mtp_loss_factor", to=0.1)),
    ("kimi_k2", set_in("norm_epsilon", to=1e-5)),
    ("deepseek_v2_lite", set_in("moe", "router", "renormalise", to=True)),
    ("gpt_oss_20b", set_in("attention", "sliding_window", "window_tokens", to=15)),
    ("gpt_oss_20b", set_in("activation", "clamp_limit", to=1.1)),
    ("glm_4_5_air", set_in("rope", "rotary_fraction", to=1.0)),
)
MORE_FACTS = (
    ("deepseek_v3", set_in("rope", "rope_theta", to=20_000.0)),
    ("deepseek_v3", set_in("rope", "scaling", "factor", to=32.0)),
    ("deepseek_v3", set_in("rope", "scaling", "original_max_position_embeddings", to=8192)),
    ("deepseek_v3", set_in("rope", "scaling", to=None)),
    ("deepseek_v3", set_in("moe", "router", "scaling_factor", to=2.4)),
    ("kimi_k2", set_in("rope", "scaling", "beta_fast", to=32.0)),
    ("gpt_oss_20b", set_in("attention", "sliding_window", "full_attention_every", to=3)),
    ("gpt_oss_20b", set_in("rope", "scaling", "round_correction_range", to=True)),
    ("gpt_oss_20b", set_in("activation", "linear_offset", to=0.9)),
)


@pytest.mark.parametrize(
    ("key", "fact"), [*FACTS, *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE_FACTS)]
)
def test_a_fact_that_is_wrong_on_one_side_shows(
    key: str, fact: Callable[[ModelSpec], ModelSpec], zygote: Zygote
) -> None:
    case = case_of(key)
    wrong = case.recipe.model_copy(update={"model": fact(case.recipe.model)})
    assert not proof_of(zygote, replace(case, recipe=wrong)).is_equal


def test_a_map_that_confuses_gate_and_linear_part_is_found_and_the_tensor_named(zygote: Zygote) -> None:
    case = case_of("mixtral_8x7b")
    planted = tuple(
        replace(rule, huggingface=rule.huggingface[::-1])
        if rule.label == "decoder.layers.1.mlp.experts.experts.linear_fc1.weight[3]"
        else rule
        for rule in case.rules
    )
    proof = proof_of(zygote, replace(case, rules=planted))
    assert proof.first_difference == "decoder.layers.1.mlp"
    suspects = {error.tensor for error in proof.suspects if error.error_fraction > 0.1}
    assert "decoder.layers.1.mlp.experts.experts.linear_fc1.weight" in suspects
    assert all(tensor.startswith("decoder.layers.1.") for tensor in suspects)
    assert not proof.is_equal


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ("decoder.layers.0.self_attention.core_attention.softmax_offset", "model.layers.0.self_attn.sinks"),
        ("output_layer.weight", "lm_head.weight"),
    ],
)
def test_a_tensor_that_the_map_leaves_out_is_named(dropped: str, message: str, zygote: Zygote) -> None:
    case = case_of("gpt_oss_20b")
    rules = tuple(rule for rule in case.rules if rule.megatron != dropped)
    with pytest.raises(BadInputError, match=message):
        zygote.call(run_parity, replace(case, rules=rules))


def _ignore(layout: VerifyLayout) -> None:
    """Progress that nobody watches."""


def _verified(key: str) -> Verification:
    asked = LOADER.recipe(find_recipe(key, LOADER))
    return verify(
        asked,
        host=LOADER.system("cpu_host"),
        environment={"SLURM_JOB_ID": "7"},
        command=("moe-bench", "verify", key),
        source_root=recipes_root().parent,
        on_layout=_ignore,
    )


def test_a_proof_says_what_was_compared(zygote: Zygote) -> None:
    found: Verification = zygote.call(_verified, "moonlight_16b_a3b")
    assert found.is_proven
    assert [proof.layout for proof in found.proofs] == ["1 process", "TP2 x EP2"]
    assert found.departures == ("kv_a_layernorm: epsilon 1e-05, the class fixes 1e-06",)
    assert found.model == LOADER.model("moonlight_16b_a3b")
    assert "model.num_layers" in {row.field for row in found.substitutions}
    assert found.provenance.job_id == "job7"
    assert found.provenance.packages["transformers"].startswith("5.")
