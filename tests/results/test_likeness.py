"""Only like runs are divided: what counts as a difference, what is under test, and what is a repeat."""

import pytest

from moe_bench.errors import BadInputError
from moe_bench.results.facts import facts_of, software_of
from moe_bench.results.likeness import (
    UnlikeRunsError,
    differences,
    is_covered,
    require_known,
    run_sets,
)
from moe_bench.results.record import GpuFacts, Record
from moe_bench.spec.scale import Plan
from tests.results.records import RECIPE, full, one_rank, record


def changed(**updates: object) -> Plan:
    """A full-scale plan of a changed recipe."""
    return full().model_copy(update={"recipe": RECIPE.model_copy(update=updates)})


def with_gpu(base: Record, **facts: object) -> Record:
    gpu = GpuFacts(name="NVIDIA H100 80GB HBM3", driver_version="580.1", **facts)  # type: ignore[arg-type]
    provenance = base.provenance.model_copy(update={"gpus": (gpu,) * base.num_ranks})
    return base.model_copy(update={"provenance": provenance})


def differing(base: Record, new: Record) -> list[str]:
    return [one.fact for one in differences(facts_of(base), facts_of(new))]


def test_a_repeat_of_a_run_does_not_differ_from_it() -> None:
    again = record(full(), started_at="2026-11-23T07:00:00+00:00", job_id="pid2", repeat=1)
    assert differing(record(full()), again) == []


@pytest.mark.parametrize(
    ("updates", "expected"),
    [
        ({"global_batch_size": 8}, ["global_batch_size"]),
        ({"precision": "mxfp8"}, ["precision"]),
        ({"parallel": RECIPE.parallel.model_copy(update={"expert": 4})}, ["parallel.expert"]),
        ({"model": RECIPE.model.model_copy(update={"num_layers": 4})}, ["model.num_layers"]),
        ({"env": {**RECIPE.env, "NCCL_ALGO": "Ring"}}, ["env.NCCL_ALGO"]),
    ],
)
def test_every_part_of_the_recipe_as_run_counts(updates: dict[str, object], expected: list[str]) -> None:
    assert differing(record(full()), record(changed(**updates))) == expected


@pytest.mark.parametrize("updates", [{"variant": "other"}, {"reproduces": "another-row"}])
def test_what_a_recipe_is_called_does_not_count(updates: dict[str, object]) -> None:
    assert differing(record(full()), record(changed(**updates))) == []


def test_scale_kernels_and_gpu_count() -> None:
    assert "scale" in differing(record(full()), record())
    assert "scale" in differing(record(full()), record(one_rank()))
    assert differing(record(full()), record(full(), dispatcher="DeepEP")) == ["implementations.dispatcher"]
    slow = with_gpu(record(full()), power_limit_w=500.0)
    assert differing(with_gpu(record(full()), power_limit_w=700.0), slow) == ["gpu.power_limit_w"]


def test_versions_are_told_apart_from_facts() -> None:
    new = record(full(), commit="fedcba")
    assert differing(record(full()), new) == []
    (one,) = differences(software_of(record(full())), software_of(new))
    assert str(one) == "commit: 0123456789abcdef against fedcba"


def test_runs_are_repeats_only_of_the_same_recipe_and_the_same_commit() -> None:
    made = [
        record(full(), started_at="2026-11-22T09:00:00+00:00"),
        record(full(), started_at="2026-11-22T08:00:00+00:00", repeat=1),
        record(full(), commit="fedcba"),
        record(changed(seed=1)),
    ]
    sets = run_sets(made)
    assert sorted(len(one.runs) for one in sets) == [1, 1, 2]
    starts = [one.started_at for one in next(s for s in sets if len(s.runs) == 2).runs]
    assert starts == sorted(starts)


@pytest.mark.parametrize(
    ("fact", "field", "expected"),
    [
        ("dispatch.dispatcher", "dispatcher", True),
        ("implementations.dispatcher", "dispatcher", True),
        ("dispatch.dispatcher", "dispatch", True),
        ("dispatch.dispatcher", "dispatch.dispatcher", True),
        ("implementations.dispatcher", "dispatch.dispatcher", False),
        ("dispatch.dispatcher", "disp", False),
        ("overlap.expert_parallel", "parallel", False),
    ],
)
def test_a_field_covers_its_name_its_last_word_and_what_is_below(
    fact: str, field: str, expected: bool
) -> None:
    assert is_covered(fact, (field,)) is expected


def test_a_field_that_runs_do_not_have_offers_the_nearest() -> None:
    require_known(["dispatcher"], facts_of(record()))
    with pytest.raises(BadInputError, match=r"--vary dispacher: .* did you mean 'dispatcher'"):
        require_known(["dispacher"], facts_of(record()))


def test_a_refusal_names_what_differs_and_hides_the_rest() -> None:
    unlike = differences(facts_of(record(full())), facts_of(record()))
    text = str(UnlikeRunsError("BASE", "NEW", unlike))
    assert text.startswith("BASE and NEW are unlike: scale: full against smoke; ")
    assert f"and {len(unlike) - 8} more" in text
