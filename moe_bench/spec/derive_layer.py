"""A recipe around one MoE layer, for what is asked of recipes: Megatron-Core arguments and costs.

Its model has one layer and a filler for everything that is not experts, which nobody builds or prices.
"""

from __future__ import annotations

from moe_bench.spec.kernel_family import with_kernels
from moe_bench.spec.layer_case import LayerCase
from moe_bench.spec.legality import legality_problems
from moe_bench.spec.mixer import GroupedQueryAttention
from moe_bench.spec.model import ModelSpec, PublishedSize
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.recipe import KernelFamily, KernelSpec, Recipe, Routing
from moe_bench.spec.rope import Rope
from moe_bench.spec.system import SystemSpec
from moe_bench.spec.yaml_tree import dotted

_KEY = "moe_layer"
_HEAD_DIM = 64


def layer_recipe(case: LayerCase, system: SystemSpec) -> Recipe:
    """One step of one micro batch of `case` on `system`, each of `ep_size` ranks routing as many tokens."""
    return Recipe(
        model=_model(case),
        system=system,
        precision=case.precision,
        seq_len=case.num_tokens,
        global_batch_size=case.ep_size,
        micro_batch_size=1,
        num_mtp_layers=0,
        parallel=ParallelSpec(num_gpus=case.ep_size, expert=case.ep_size),
        low_precision=case.low_precision,
        kernels=case.kernels,
        dispatch=case.dispatch,
        routing=Routing(mode="natural"),
        seed=case.seed,
    )


def case_on(case: LayerCase, family: KernelFamily, system: SystemSpec, *, is_grouped: bool) -> LayerCase:
    """The case on the kernels of `family`: as it names them, or on the fast path of another family, as slices
    have it (moe_bench/spec/kernel_family.py). Not grouped, it is Megatron-Core's loop over experts as it is.

    The arithmetic stays what the case asks for, whether the family has it or not.
    """
    if not is_grouped:
        return case.with_kernels(KernelSpec(family=family, grouped_gemm=False))
    return case.with_kernels(with_kernels(layer_recipe(case, system), family).kernels)


def layer_obstacle(case: LayerCase, system: SystemSpec) -> str | None:
    """What the rules of recipes have against `case` on `system`, in one line; None where it can be built."""
    problems = legality_problems(layer_recipe(case, system))
    return "; ".join(f"{dotted(one.path)}: {one.problem}" for one in problems) or None


def _model(case: LayerCase) -> ModelSpec:
    return ModelSpec(
        key=_KEY,
        display_name=case.name,
        num_layers=1,
        hidden_size=case.hidden_size,
        vocab_size=_HEAD_DIM,
        max_position_embeddings=case.num_tokens,
        dense_ffn_hidden_size=None,
        attention=GroupedQueryAttention(kind="gqa", num_heads=1, num_query_groups=1, head_dim=_HEAD_DIM),
        rope=Rope(rope_theta=10_000.0),
        activation=case.activation,
        moe=case.moe.model_copy(update={"num_leading_dense_layers": 0, "every_n_layers": 1}),
        linear_bias=case.linear_bias,
        norm_epsilon=1e-6,
        init_std=case.init_std,
        published=PublishedSize(total_params=1.0, active_params=1.0, source="a layer, no model"),
        sources=(case.name,),
    )
