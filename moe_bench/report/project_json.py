"""A projection as JSON, with the units in the names; the terms sum to the step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_bench.analysis.memory import MemoryFit, needed_bytes
from moe_bench.analysis.memory_verdict import rank_verdict, verdict
from moe_bench.projection.forecast import Forecast
from moe_bench.projection.nearest import NearRow
from moe_bench.report.project_view import limits_text
from moe_bench.report.recipe_list import layout_label
from moe_bench.results.flops_convention import OUR_COUNTING

if TYPE_CHECKING:
    from moe_bench.projection.cost import TrainingCost
    from moe_bench.projection.scaleout import ScaleOut


def forecast_json(made: Forecast) -> dict[str, object]:
    """Everything about one recipe."""
    projection = made.projection
    timeline = projection.timeline
    return {
        "recipe": made.recipe.name,
        "num_gpus": made.recipe.parallel.num_gpus,
        "layout": layout_label(made.recipe),
        "step_s": projection.step_s,
        "interval": dataclasses.asdict(made.interval),
        "tokens_per_s_per_gpu": projection.tokens_per_s_per_gpu,
        "flops_per_s_per_gpu": projection.flops_per_s_per_gpu,
        "flops_counting": OUR_COUNTING,
        "mfu_fraction": projection.mfu_fraction,
        "mfu_peak": "dense BF16",
        "terms": [
            {
                "name": term.name,
                "seconds": term.seconds,
                "share_fraction": term.seconds / projection.step_s,
                "evidence": term.grade.label,
            }
            for term in projection.terms
        ],
        "passes_s": {str(name): seconds for name, seconds in projection.passes_s.items()},
        "critical_rank": projection.critical_rank,
        "bubble_fraction": None if timeline is None else timeline.bubble_fraction,
        "schedule": None if timeline is None else timeline.shape.kind.label,
        "limits": limits_text(made),
        "memory": memory_json(made.memory),
        "load": dataclasses.asdict(made.load),
        "assumptions": list(made.assumptions),
    }


def memory_json(fit: MemoryFit) -> dict[str, object]:
    """Point and upper bound of every pipeline rank."""
    return {
        "verdict": verdict(fit),
        "usable_bytes": fit.usable_bytes,
        "ranks": [
            {
                "pipeline_rank": rank.pipeline_rank,
                "total_bytes": rank.total_bytes,
                "upper_bound_bytes": needed_bytes(rank),
                "verdict": rank_verdict(rank, fit.usable_bytes),
            }
            for rank in fit.ranks
        ],
    }


def near_json(near: Sequence[NearRow]) -> list[dict[str, object]]:
    """Published rows beside their own projections."""
    return [
        {
            "row": one.run.row.id,
            "published_tokens_per_s_per_gpu": one.run.tokens_per_s_per_gpu,
            "published_basis": one.run.target.basis,
            "projected_tokens_per_s_per_gpu": one.projected_tokens_per_s_per_gpu,
            "projected_over_published_ratio": one.ratio,
            "p90_ratios": list(one.p90_ratios),
            "trust": one.run.row.trust,
            "differences": list(one.differences),
            "assumptions": {each.field: each.value for each in one.run.assumptions},
        }
        for one in near
    ]


def scale_json(curve: ScaleOut) -> dict[str, object]:
    """A curve and the sizes that it has not."""
    return {
        "scaling": "strong" if curve.is_strong else "weak",
        "points": [
            {
                "recipe": point.projection.recipe.name,
                "num_gpus": point.num_gpus,
                "global_batch_size": point.projection.recipe.global_batch_size,
                "step_s": point.projection.step_s,
                "p90_step_s": point.p90_step_s,
                "tokens_per_s_per_gpu": point.projection.tokens_per_s_per_gpu,
                "efficiency_ratio": point.efficiency_ratio,
                "expert_level": point.expert_level,
                "data_level": point.data_level,
                "pipeline_level": point.pipeline_level,
            }
            for point in curve.points
        ],
        "refused": [dataclasses.asdict(size) for size in curve.refused],
    }


def cost_json(costs: Sequence[TrainingCost], *, price_per_gpu_hour: float | None) -> list[dict[str, object]]:
    """A whole training at each size; the energy is an upper bound."""
    prices = [
        None if price_per_gpu_hour is None else cost.price(per_gpu_hour=price_per_gpu_hour) for cost in costs
    ]
    return [
        {**dataclasses.asdict(cost), "price_per_gpu_hour": price_per_gpu_hour, "price": price}
        for cost, price in zip(costs, prices, strict=True)
    ]
