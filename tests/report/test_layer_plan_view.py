"""What is projected of MoE layers before they run."""

from __future__ import annotations

import pytest

from moe_bench.report.layer_plan_view import (
    kernels_text,
    layer_plan_json,
    layer_plan_view,
    planned_layers,
)
from moe_bench.results.sonicmoe import SHAPES
from moe_bench.spec.catalogue import recipes_root
from moe_bench.spec.derive_layer import case_on
from moe_bench.spec.load import Loader
from tests.report.test_layer_view import printed

SYSTEM = Loader(root=recipes_root()).system("h100_sxm")


def test_the_suite_is_planned_beside_what_was_published() -> None:
    planned = planned_layers([shape.case() for shape in SHAPES], SYSTEM)
    text = printed(layer_plan_view(planned, SYSTEM))
    assert sum(line.startswith("sonicmoe/") for line in text.splitlines()) == 12
    assert "107/139" in text
    assert "shared experts" not in text


def test_rates_are_the_experts_operations_over_the_time_of_each_pass() -> None:
    (planned,) = planned_layers([SHAPES[0].case()], SYSTEM)
    forward, backward = planned.rates_flops_per_s
    # 6 and 12 T K d n
    flops = 40960 * 8 * 768 * 256
    assert 6 * flops / forward + 12 * flops / backward == pytest.approx(planned.total_s())
    (data,) = layer_plan_json([planned])
    assert data["total_s"] == planned.total_s()


def test_kernels_are_named_with_what_they_fuse() -> None:
    case = SHAPES[0].case()
    assert kernels_text(case.kernels) == "torch_native +router +permute +activation"
    alone = case_on(case, "torch_native", SYSTEM, is_grouped=False)
    assert kernels_text(alone.kernels) == "torch_native, one by one"
    gathered = case_on(case, "quack", SYSTEM, is_grouped=True)
    assert kernels_text(gathered.kernels).startswith("quack")
    own, others = (
        planned_layers([one], SYSTEM)[0].total_s("permute and unpermute") for one in (gathered, case)
    )
    # experts that gather write no permuted copy
    assert own < others
