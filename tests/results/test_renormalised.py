"""Published rows on our scale, against hand arithmetic."""

import pytest

from moe_bench.results.flops_convention import CONVENTIONS, FlopsConvention
from moe_bench.results.published import PublishedRow, model_key
from moe_bench.results.renormalised import Basis, renormalised
from moe_bench.spec.recipe import Recipe

Rows = dict[str, PublishedRow]
Templates = dict[str, Recipe]


def of(row: PublishedRow, templates: Templates) -> object:
    template = templates.get(model_key(row.model))
    return renormalised(row, None if template is None else template.model)


def test_printed_tokens_times_our_count_give_our_tflops(rows: Rows, templates: Templates) -> None:
    row = rows["torchtitan-deepseek-v3-h100-512gpu-bf16-s4096-deepep"]
    found = renormalised(row, templates["deepseek_v3"].model)
    assert (found.tokens_per_s_per_gpu, found.basis) == (579, Basis.PRINTED)
    # 579 x 249.8 GFLOPs; printed 162.82 with full attention and the router
    assert found.flops_per_s_per_gpu == pytest.approx(579 * 249.8e9, rel=1e-3)
    assert found.printed_flops_per_s_per_gpu == pytest.approx(162.82e12)


def test_a_wrong_count_is_corrected(rows: Rows, templates: Templates) -> None:
    row = rows["mb25.11-gpt-oss-120b-gb300-64gpu-bf16-s8192"]
    found = renormalised(row, templates["gpt_oss_120b"].model)
    # 565 TFLOPs at 30.8 GFLOPs per token are 632 at 34.4
    assert found.flops_per_s_per_gpu == pytest.approx(565e12 * 34.44 / 30.80, rel=2e-3)


def test_a_step_time_serves_where_no_throughput_is_printed(rows: Rows, templates: Templates) -> None:
    row = rows["dgxc-v25.08.02-example-deepseek-v3-h100-1024gpu-bf16-s4096"]
    found = renormalised(row, templates["deepseek_v3"].model)
    assert found.basis is Basis.STEP_TIME
    assert found.tokens_per_s_per_gpu == row.tokens_per_s_per_gpu_from_step


def test_tflops_alone_are_divided_by_the_count_of_their_own_convention(
    rows: Rows, templates: Templates
) -> None:
    printed = rows["torchtitan-deepseek-v3-h100-512gpu-bf16-s4096-deepep"]
    tree = printed.model_dump(mode="json")
    tree["metrics"] |= {"tokens_per_s_per_gpu": None}
    row = PublishedRow.model_validate(tree, strict=False)
    found = renormalised(row, templates["deepseek_v3"].model)
    assert found.basis is Basis.TFLOPS
    assert found.tokens_per_s_per_gpu == pytest.approx(579, rel=1e-3)  # 162.8e12 / 281.2e9


def test_stored_estimates_are_what_the_count_gives(rows: Rows, templates: Templates) -> None:
    compared = 0
    for row in rows.values():
        if row.estimate is None or row.estimate.basis != "tflops" or model_key(row.model) not in templates:
            continue
        tree = row.model_dump(mode="json") | {"estimate": None}
        bare = PublishedRow.model_validate(tree, strict=False)
        found = renormalised(bare, templates[model_key(row.model)].model)
        assert found.tokens_per_s_per_gpu == pytest.approx(row.estimate.tokens_per_s_per_gpu, rel=0.005)
        compared += 1
    assert compared > 30


def test_a_row_without_an_architecture_keeps_what_was_printed(rows: Rows) -> None:
    row = rows["mb25.09-llama3-70b-gb200-64gpu-mxfp8-s8192"]
    found = renormalised(row, None)
    assert found.flops_per_s_per_gpu is None
    assert found.printed_flops_per_s_per_gpu == (row.metrics.tflops_per_gpu or 0) * 1e12


def test_conventions_with_a_formula_renormalise_rows_of_every_one_of_them(
    rows: Rows, templates: Templates
) -> None:
    """All but dgxc's, whose rows are of dense models and of Grok-1, which `recipes/` does not have, and
    that of old README claims, which name no number of GPUs."""
    renormalised_conventions = {
        row.flops_convention
        for row in rows.values()
        if (template := templates.get(model_key(row.model))) is not None
        and renormalised(row, template.model).flops_per_s_per_gpu is not None
    }
    with_formula = {name for name, convention in CONVENTIONS.items() if convention.counting is not None}
    assert with_formula - renormalised_conventions == {
        FlopsConvention.DGXC,
        FlopsConvention.MCORE_FULL_ATTENTION,
    }
