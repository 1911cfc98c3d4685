"""Steps under torch.profiler on the CPU: files, named parts, kernels, and timed steps left alone."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from moe_bench.harness.mcore_config import megatron_arguments
from moe_bench.harness.profile import SpanClock
from moe_bench.harness.session import Outcome, run
from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.derive_slice import tiny_slice_plan
from moe_bench.spec.load import Loader
from moe_bench.spec.profile import Profile, is_profiled
from moe_bench.spec.scale import Plan, full_plan, smoke_plan
from tests.harness.zygote import Zygote


def plan_of(model: str, *, is_slice: bool) -> Plan:
    loader = Loader(root=recipes_root())
    asked = loader.recipe(find_recipe(model, loader))
    derive = tiny_slice_plan if is_slice else smoke_plan
    return derive(asked, host=loader.system("cpu_host"), modified=())


def profiled_run(profile: Profile, plan: Plan) -> Outcome | None:
    return run(
        megatron_arguments(plan.recipe),
        rendezvous=None,
        on_report=lambda report: None,
        slice_rank=plan.rank if plan.is_slice else None,
        profile=profile,
    )


@pytest.mark.parametrize(("model", "is_slice"), [("deepseek_v3", True), ("qwen3_30b_a3b", False)])
def test_every_part_is_named_in_a_trace_beside_its_kernels(
    zygote: Zygote, tmp_path: Path, model: str, is_slice: bool
) -> None:
    plan = plan_of(model, is_slice=is_slice)
    profile = Profile(tool="torch", num_steps=2, stem=str(tmp_path / "run"))
    outcome = zygote.call(partial(profiled_run, profile), plan)
    assert outcome.traces == ("run-rank0.trace.json.gz", "run-rank0.kernels.csv")
    # the profiled steps are none of the run's
    steps = plan.recipe.steps
    assert len(outcome.samples.step_times_s[0]) == steps.num_timed
    assert len(outcome.samples.grad_norms) == steps.num_warmup + steps.num_timed
    with gzip.open(tmp_path / outcome.traces[0]) as file:
        events = json.load(file)["traceEvents"]
    named = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
    own = [chunk for chunk in plan.recipe.chunks() if chunk.pipeline_rank == plan.pipeline_rank]
    num_layers = sum(len(chunk.layers) for chunk in own)
    num_passes = 2 * plan.recipe.num_micro_batches * num_layers
    assert named["attention bwd"] == num_passes
    # what is recomputed runs forward twice
    assert named["attention fwd"] == num_passes * (1 + (plan.recipe.recompute.granularity == "full"))
    for name in ("MoE layer fwd", "MoE layer bwd", "router fwd", "fc1 fwd", "combine fwd"):
        assert named[name] > 0
    assert named["optimizer"] == 2
    with (tmp_path / outcome.traces[1]).open() as file:
        kernels = list(csv.DictReader(file))
    assert {"GEMM", "grouped GEMM"} <= {line["kind"] for line in kernels}
    assert sum(float(line["percent"]) for line in kernels) == pytest.approx(100, abs=1)


def test_parts_of_a_step_are_timed_with_what_runs_inside_them(zygote: Zygote, tmp_path: Path) -> None:
    plan = plan_of("deepseek_v3", is_slice=True)
    profile = Profile(tool="parts", num_steps=2, stem=str(tmp_path / "run"))
    outcome = zygote.call(partial(profiled_run, profile), plan)
    assert outcome.traces == ("run-rank0.parts.csv",)
    with (tmp_path / outcome.traces[0]).open() as file:
        parts = {line["part"]: line for line in csv.DictReader(file)}
    own = [chunk for chunk in plan.recipe.chunks() if chunk.pipeline_rank == plan.pipeline_rank]
    num_layers = sum(len(chunk.layers) for chunk in own)
    assert int(parts["attention bwd"]["calls"]) == 2 * plan.recipe.num_micro_batches * num_layers
    inside = sum(float(parts[f"{name} fwd"]["total_ms"]) for name in ("router", "permute", "fc1", "fc2"))
    assert 0 < inside < float(parts["MoE layer fwd"]["total_ms"])


def test_a_range_holds_those_inside_it_and_calls_of_a_name_add_up() -> None:
    class Ticks:
        """A clock that ticks once at every mark."""

        def __init__(self) -> None:
            self.now = 0

        def mark(self) -> int:
            self.now += 1
            return self.now

        def between_s(self, start: int, end: int) -> float:
            return float(end - start)

    spans = SpanClock(Ticks())
    for _ in range(2):
        layer = spans.start("MoE layer fwd")
        router = spans.start("router fwd")
        spans.end(router)
        spans.end(layer)
    assert [(line.name, line.num_calls, line.total_s) for line in spans.lines()] == [
        ("router fwd", 2, 2.0),
        ("MoE layer fwd", 2, 6.0),
    ]


def test_the_first_rank_of_every_stage_is_traced() -> None:
    loader = Loader(root=recipes_root())
    plan = full_plan(loader.recipe(find_recipe("deepseek_v3/h100_sxm_256g_bf16", loader)), modified=())
    assert [rank for rank in range(256) if is_profiled(plan, rank)] == [0, 64, 128, 192]
