"""The axes of a search have the values they should, and a layout changes what it decides and no more."""

import pytest

from moe_bench.projection.search.layout import (
    AXES_OF_FIELD,
    Axis,
    Context,
    Layout,
    Sharding,
    Widths,
    recipe_of,
)
from moe_bench.projection.search.splits import Split
from moe_bench.spec.kernel_family import with_kernels
from moe_bench.spec.legality import legality_problems
from moe_bench.spec.recipe import Recipe, Recompute
from tests.projection.search_spaces import space_of

BASE = space_of("qwen3_30b_a3b", 16).base
PLAIN = Layout(
    widths=Widths(1, 1),
    context=Context(1, "p2p"),
    micro_batch_size=1,
    overlaps_experts=False,
    expert=8,
    dispatcher="deepep",
    recompute=Recompute(),
    sharding=Sharding("distributed_optimizer", "optim_grads_params", 1),
    split=Split(1, 1, None),
)


def made(**changes: object) -> Recipe:
    return recipe_of(BASE, PLAIN._replace(**changes))


def differences(one: Recipe, other: Recipe) -> set[str]:
    found = set()
    for name in Recipe.model_fields:
        mine, theirs = getattr(one, name), getattr(other, name)
        if mine != theirs and name in ("parallel", "overlap"):
            for key in type(mine).model_fields:
                if getattr(mine, key) != getattr(theirs, key):
                    found.add(f"{name}.{key}")
        elif mine != theirs:
            found.add(name)
    return found


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        (
            {"widths": Widths(4, 2)},
            {"parallel.tensor", "parallel.expert_tensor", "parallel.sequence_parallel", "env"},
        ),
        ({"context": Context(2, "a2a")}, {"parallel.context", "parallel.context_comm", "env"}),
        (
            {"sharding": Sharding("megatron_fsdp", "optim_grads", 2)},
            {"parallel.data_sharding", "parallel.fsdp_strategy", "parallel.num_optimizer_instances"},
        ),
        ({"micro_batch_size": 4}, {"micro_batch_size"}),
        ({"overlaps_experts": True}, {"overlap.expert_parallel"}),
        ({"expert": 4}, {"parallel.expert"}),
        ({"dispatcher": "hybridep"}, {"dispatch", "env", "mcore"}),
        (
            {"recompute": Recompute(granularity="full", method="uniform", num_layers=1)},
            {"recompute", "cuda_graphs"},
        ),
        (
            {"split": Split(2, 2, "Et*11|(t*12|)*2t*13L")},
            {"parallel.pipeline", "parallel.virtual_pipeline", "parallel.layout", "overlap.p2p"},
        ),
    ],
)
def test_an_axis_changes_what_it_decides_and_nothing_else(
    changes: dict[str, object], fields: set[str]
) -> None:
    assert differences(made(), made(**changes)) == fields
    assert fields <= set(AXES_OF_FIELD)


def test_hybridep_is_told_how_many_ranks_share_a_domain_and_others_are_not() -> None:
    key = "NUM_OF_HYBRID_EP_RANKS_PER_NVLINK_DOMAIN"
    assert made(dispatcher="hybridep", expert=4).env[key] == "4"
    assert made(dispatcher="hybridep", expert=16).env[key] == "8"
    on_racks = space_of("qwen3_235b_a22b", 64, system="gb200_nvl72").base
    env = recipe_of(on_racks, PLAIN._replace(dispatcher="hybridep", expert=64)).env
    assert (env[key], env["NVLINK_DOMAIN_SIZE"], env["USE_MNNVL"]) == ("64", "72", "1")
    assert not any("HYBRID" in name or "NVLINK" in name for name in made().env)
    assert "moe_permute_fusion_into_hybridep" not in made().mcore


def test_connections_of_hopper_follow_tensor_and_context_parallelism() -> None:
    key = "CUDA_DEVICE_MAX_CONNECTIONS"
    assert made().env[key] == "32"
    assert made(widths=Widths(2, 1)).env[key] == "1"
    assert made(context=Context(2, "p2p")).env[key] == "1"
    assert made(widths=Widths(2, 1), overlaps_experts=True).env[key] == "32"


def test_a_field_that_is_set_keeps_its_value() -> None:
    space = space_of(
        "qwen3_30b_a3b", 16, "parallel.tensor=2", "parallel.expert_tensor=1", "dispatch.dispatcher=alltoall",
        "recompute.granularity=none", "overlap.expert_parallel=false", "micro_batch_size=4",
        "parallel.expert=8", "parallel.context=1", "parallel.pipeline=4", "parallel.virtual_pipeline=3",
        "parallel.layout=null", "parallel.data_sharding=megatron_fsdp", "parallel.fsdp_strategy=optim",
        "parallel.num_optimizer_instances=2",
    )  # fmt: skip
    assert space.sizes == (1,) * len(Axis)
    assert space.shardings == (Sharding("megatron_fsdp", "optim", 2),)
    [split] = space.splits
    assert split == Split(4, 3, None)
    assert space.layout((0,) * len(Axis)).widths == Widths(2, 1)


def test_a_rank_keeps_as_many_tokens_of_a_sequence_as_the_space_says() -> None:
    assert space_of("qwen3_30b_a3b", 16, global_batch_size=64).contexts == (Context(1, "p2p"),)
    long = space_of("qwen3_30b_a3b", 16, seq_len=16384, global_batch_size=64)
    assert long.contexts == (
        Context(1, "p2p"),
        *(Context(size, comm) for size in (2, 4) for comm in ("p2p", "a2a", "allgather")),
    )
    one = space_of("qwen3_30b_a3b", 16, "parallel.context_comm=a2a", seq_len=16384, global_batch_size=64)
    assert [context.comm for context in one.contexts] == ["a2a"] * 3


def test_who_shards_is_searched_and_the_distributed_optimizer_comes_first() -> None:
    shardings = BASE_SPACE.shardings
    assert shardings[0].data_sharding == "distributed_optimizer"
    assert {one.fsdp_strategy for one in shardings if one.is_fsdp} == {
        "optim", "optim_grads", "optim_grads_params",
    }  # fmt: skip
    assert {one.num_instances for one in shardings if one.divides_weights} == {1, 2, 4, 8}
    pinned = space_of("qwen3_30b_a3b", 16, "parallel.data_sharding=megatron_fsdp")
    assert all(one.is_fsdp for one in pinned.shardings)


def test_what_megatron_fsdp_asks_for_follows_from_it() -> None:
    fsdp = Sharding("megatron_fsdp", "optim_grads_params", 1)
    base = BASE.model_copy(
        update={
            "overlap": BASE.overlap.model_copy(update={"grad_reduce": False, "param_gather": False}),
            "env": {**BASE.env, "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
        }
    )
    recipe = recipe_of(base, PLAIN._replace(sharding=fsdp, widths=Widths(2, 1)))
    assert recipe.overlap.grad_reduce
    assert recipe.overlap.param_gather
    assert recipe.env["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    assert not legality_problems(recipe)
    native = with_kernels(BASE, "torch_native")
    assert native.kernels.fusions.gradient_accumulation
    assert not recipe_of(native, PLAIN._replace(sharding=fsdp)).kernels.fusions.gradient_accumulation


def test_recompute_sets_name_what_the_model_has() -> None:
    modules = {module for one in BASE_SPACE.recomputes for module in one.modules}
    assert modules == {"moe_act", "layernorm", "moe"}
    sets = [(one.granularity, frozenset(one.modules)) for one in BASE_SPACE.recomputes]
    assert len(sets) == len(set(sets))


BASE_SPACE = space_of("qwen3_30b_a3b", 16)


def test_all_combinations_are_counted() -> None:
    number = 1
    for values in BASE_SPACE.axes:
        number *= len(values)
    assert BASE_SPACE.num_layouts == number
