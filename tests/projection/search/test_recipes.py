"""Names of recipes that a search writes tell them apart and read as the layout."""

from moe_bench.projection.search.layout import Context, Layout, Sharding, Widths, recipe_of
from moe_bench.projection.search.recipes import comment, named
from moe_bench.projection.search.splits import Split
from moe_bench.spec.recipe import Recompute
from tests.projection.search_spaces import legal_families, space_of

SPACE = space_of("qwen3_30b_a3b", 16, global_batch_size=256)


def test_a_name_says_batch_and_layout() -> None:
    layout = Layout(
        widths=Widths(2, 1),
        context=Context(2, "a2a"),
        micro_batch_size=2,
        overlaps_experts=True,
        expert=4,
        dispatcher="deepep",
        recompute=Recompute(granularity="selective", modules=("layernorm", "moe_act")),
        sharding=Sharding("megatron_fsdp", "optim_grads", 2),
        split=Split(2, 2, "Et*11|(t*12|)*2t*13L"),
    )
    recipe = named(recipe_of(SPACE.base, layout), layout)
    assert recipe.run_name == (
        "h100_sxm_16g_bf16_search_s4096_gbs256_mbs2_tp2_cp2_ep4_pp2_vpp2_a2a_fsdp_optim_grads_inst2_11to13_deepep_overlap_recompute_layernorm_moe_act"
    )


def test_no_two_legal_layouts_are_called_alike() -> None:
    names = set()
    number = 0
    for family, splits in legal_families(SPACE)[::23]:
        for split in splits:
            indices = (*family, split)
            names.add(named(SPACE.recipe(indices), SPACE.layout(indices)).name)
            number += 1
    assert number > 500
    assert len(names) == number


def test_the_comment_has_the_command_and_where_the_rest_is_from() -> None:
    text = comment("moe-bench search m --system s", ("all but the layout from m/r", "global batch 4"))
    assert text == (
        "Found by `moe-bench search m --system s`: all but the layout from m/r; global batch 4. "
        "Projected, not measured."
    )
