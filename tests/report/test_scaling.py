"""Efficiency is throughput per GPU over that of the smallest size, within one family and one kind."""

import dataclasses
import io
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from moe_bench.cli import main
from moe_bench.errors import BadInputError
from moe_bench.launch.job_state import JobState
from moe_bench.launch.jobs import JobReport
from moe_bench.report.html.scaling_charts import scaling_charts
from moe_bench.report.scaling import (
    Curve,
    Kind,
    MissingPoint,
    Mode,
    ScalingPoint,
    Subject,
    curves,
    missing_point,
    missing_points,
    record_points,
    row_points,
    scaling_of,
)
from moe_bench.report.scaling_plot import write_scaling_plot
from moe_bench.report.scaling_table import missing_text, scaling_frame, scaling_view
from moe_bench.results.published import PublishedRow, load_rows
from moe_bench.results.record import Record
from moe_bench.results.store import write_record
from moe_bench.spec.catalogue import data_root, recipes_root
from moe_bench.spec.family import scaled_recipe
from moe_bench.spec.load import Loader, UnknownNameError
from moe_bench.spec.recipe import Recipe
from tests.results.records import RECIPE, full, record

ROWS = load_rows(data_root() / "results" / "published")
SUBJECT = Subject(model="m", system="H100", precision="BF16", seq_len=4096)


def of_series(name: str) -> tuple[PublishedRow, ...]:
    rows = tuple(row for row in ROWS if (row.series or "").startswith(name))
    assert rows
    return rows


def only_curve(points: tuple[ScalingPoint, ...]) -> Curve:
    (curve,) = curves(points)
    return curve


def point(
    num_gpus: int, batch: int, tokens_per_s: float, kind: Kind = Kind.PROJECTED, family: str = "f"
) -> ScalingPoint:
    return ScalingPoint(
        kind=kind,
        subject=SUBJECT,
        family=family,
        label=f"{family}-{num_gpus}",
        num_gpus=num_gpus,
        global_batch_size=batch,
        layout="",
        tokens_per_s_per_gpu=tokens_per_s,
    )


def runs_at(num_gpus: int, step_s: float, *, batch: int, num_runs: int = 3) -> Iterator[Record]:
    """Repeats on `num_gpus` GPUs whose medians and steps scatter by 0.1 %."""
    parallel = RECIPE.parallel.model_copy(update={"num_gpus": num_gpus})
    recipe = RECIPE.model_copy(update={"parallel": parallel, "global_batch_size": batch})
    noise = random.Random(num_gpus)
    for repeat in range(num_runs):
        level_s = step_s * noise.gauss(1, 0.001)
        steps_s = tuple(level_s * noise.gauss(1, 0.001) for _ in range(20))
        yield record(
            full().model_copy(update={"recipe": recipe}),
            step_times_s=(steps_s,) * num_gpus,
            started_at=f"2026-11-22T07:{repeat:02}:00+00:00",
            job_id=f"on{num_gpus}",
        )


def test_the_weak_scaling_card_of_qwen3_is_flat() -> None:
    curve = only_curve(row_points(of_series("mbcard-qwen3-30b-a3b-gb300"), {}))
    assert (curve.mode, curve.kind) == (Mode.WEAK, Kind.PUBLISHED)
    assert [one.point.num_gpus for one in curve.efficiencies] == [8, 32, 128, 256]
    # 45,052.607 / 44,511.004 tokens/s/GPU, as the card prints them
    assert curve.efficiencies[-1].efficiency_ratio == pytest.approx(1.012168, abs=1e-6)


def test_deepseek_on_twice_the_gpus_loses_six_percent() -> None:
    curve = only_curve(row_points(of_series("dgxc-deepseek-v3-h100-bf16"), {}))
    assert [one.point.num_gpus for one in curve.efficiencies] == [512, 1024]
    assert curve.efficiencies[1].efficiency_ratio == pytest.approx(629.669482 / 669.445117, abs=1e-6)


def test_rows_that_print_an_mfu_alone_scale_by_its_ratio() -> None:
    mixtral = Loader(root=recipes_root(), rules=()).model("mixtral_8x22b")
    rows = of_series("mpf-table4-mixtral-8x22b-method-folding")
    curve = only_curve(row_points(rows, {mixtral.key: mixtral}))
    assert curve.mode is Mode.STRONG
    assert curve.efficiencies[-1].efficiency_ratio == pytest.approx(44.9 / 52.2)
    assert {one.point.remark for one in curve.efficiencies} == {"from MFU"}


def test_a_batch_that_neither_stays_nor_grows_with_the_gpus_makes_no_curve() -> None:
    rows = of_series("automodel-deepseek-v3-h100")
    found = scaling_of((), rows, {})
    assert found.curves == ()
    assert found.unscaled == (rows[0].series,)


def test_equal_batches_are_strong_and_equal_batches_per_gpu_are_weak_scaling() -> None:
    points = (point(8, 64, 100.0), point(16, 64, 80.0), point(32, 256, 90.0))
    strong, weak = sorted(curves(points), key=lambda curve: curve.mode)
    assert [one.efficiency_ratio for one in strong.efficiencies] == [1.0, 0.8]
    assert [one.point.num_gpus for one in weak.efficiencies] == [8, 32]
    assert weak.efficiencies[1].efficiency_ratio == pytest.approx(0.9)


@pytest.mark.parametrize(
    "other",
    [
        {"kind": Kind.MEASURED},
        {"family": "another"},
    ],
)
def test_points_of_different_kinds_or_families_are_never_joined(other: dict[str, object]) -> None:
    assert curves((point(8, 64, 100.0), point(16, 64, 80.0, **other))) == ()


def test_the_fastest_of_the_smallest_size_is_the_reference() -> None:
    curve = only_curve((point(8, 64, 90.0), point(8, 64, 100.0), point(16, 64, 50.0)))
    assert [one.efficiency_ratio for one in curve.efficiencies] == [1.0, 0.9, 0.5]


@pytest.mark.parametrize(
    ("batch", "step_s", "mode", "expected"),
    [
        # the same tokens per GPU in 1.05 of the time
        (1024, 1.05, Mode.WEAK, 1 / 1.05),
        # the same tokens on twice the GPUs in 0.6 of the time
        (512, 0.6, Mode.STRONG, 1 / (2 * 0.6)),
    ],
)
def test_measured_efficiency_has_an_interval_around_the_known_answer(
    batch: int, step_s: float, mode: Mode, expected: float
) -> None:
    points = record_points([*runs_at(8, 1.0, batch=512), *runs_at(16, step_s, batch=batch)])
    curve = only_curve(points)
    assert (curve.mode, curve.kind) == (mode, Kind.MEASURED)
    reference, larger = curve.efficiencies
    assert (reference.efficiency_ratio, reference.low_ratio) == (1.0, None)
    assert larger.low_ratio is not None
    assert larger.high_ratio is not None
    assert larger.low_ratio < expected < larger.high_ratio
    assert larger.high_ratio - larger.low_ratio < 0.02


def test_one_short_run_gives_a_number_without_an_interval() -> None:
    points = record_points(
        record(
            full().model_copy(
                update={
                    "recipe": RECIPE.model_copy(
                        update={"parallel": RECIPE.parallel.model_copy(update={"num_gpus": num_gpus})}
                    )
                }
            ),
            step_times_s=((1.0, 1.0),) * num_gpus,
        )
        for num_gpus in (8, 16)
    )
    larger = only_curve(points).efficiencies[1]
    assert (larger.efficiency_ratio, larger.low_ratio) == (0.5, None)


def test_runs_with_other_kernels_are_another_family() -> None:
    others = [
        one.model_copy(
            update={
                "samples": one.samples.model_copy(
                    update={
                        "implementations": one.samples.implementations.model_copy(
                            update={"dispatcher": "MoEFlexTokenDispatcher"}
                        )
                    }
                )
            }
        )
        for one in runs_at(16, 1.0, batch=1024)
    ]
    assert curves(record_points([*runs_at(8, 1.0, batch=512), *others])) == ()


def test_the_table_holds_every_point_with_its_kind(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for one in [*runs_at(8, 1.0, batch=512, num_runs=1), *runs_at(16, 1.0, batch=1024, num_runs=1)]:
        write_record(tmp_path, one)
    assert main(["report", str(tmp_path), "--scaling", "--model", "Qwen3-30B-A3B", "--format", "csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(",measured," in line for line in lines) == 2
    assert sum(",published," in line for line in lines) == 4


def test_a_model_without_results_is_refused_by_name() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'mixtral_8x22b'"):
        scaling_of((), ROWS, {}, model="mixtral_8x23b")


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_plot_is_written_in_the_format_that_the_name_says(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"scaling{suffix}"
    found = scaling_of(runs_at(8, 1.0, batch=512), of_series("mbcard-qwen3-30b-a3b-gb300"), {})
    write_scaling_plot(found.curves, path)
    head = path.read_bytes()[:400]
    assert head.startswith(b"\x89PNG") if suffix == ".png" else b"<svg" in head


def test_a_plot_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no scaling curve"):
        write_scaling_plot((), tmp_path / "x.png")


def test_sizes_without_room_for_their_label_have_a_tick_alone() -> None:
    sizes = [16 * 2**power for power in range(11)]
    (chart,) = scaling_charts(curves(point(size, size, 100.0) for size in sizes), {})
    labels = [tick.label for tick in chart.x.ticks]
    assert len(labels) == len(sizes)
    assert labels[-1] == "16,384"
    assert labels[-2] == ""
    assert labels[:4] == ["16", "32", "64", "128"]
    ends = [
        (tick.position_px - 3.65 * len(tick.label), tick.position_px + 3.65 * len(tick.label))
        for tick in chart.x.ticks
        if tick.label
    ]
    assert all(left[1] < right[0] for left, right in itertools.pairwise(ends))


def test_the_frame_of_no_curves_is_empty() -> None:
    assert scaling_frame(scaling_of((), (), {})).empty


def family_of(sizes: tuple[int, ...], *, reason: str) -> list[MissingPoint]:
    """Members of the weak family of `runs_at(8, ..., batch=512)` that left no number."""
    return [
        missing_point(
            full().model_copy(update={"recipe": scaled_recipe(eight(), size, strong=False)}), reason
        )
        for size in sizes
    ]


def eight() -> Recipe:
    parallel = RECIPE.parallel.model_copy(update={"num_gpus": 8})
    return RECIPE.model_copy(update={"parallel": parallel, "global_batch_size": 512})


def test_a_size_that_failed_stays_in_its_curve_with_the_reason() -> None:
    found = scaling_of(
        [*runs_at(8, 1.0, batch=512), *runs_at(16, 1.1, batch=1024)],
        (),
        {},
        missing=family_of((16, 32, 64), reason="out of memory"),
    )
    (curve,) = found.curves
    assert curve.sizes == (8, 16, 32, 64)
    # 16 GPUs have a number: a repeat of it that failed does not take it away
    assert [(point.num_gpus, point.reason) for point in curve.missing] == [
        (32, "out of memory"),
        (64, "out of memory"),
    ]
    assert found.missing == ()
    (repeat,) = curve.lost_repeats
    assert (repeat.num_gpus, repeat.reason) == (16, "out of memory")
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(scaling_view(found))
    assert "not in the number of 16 GPUs: out of memory" in console.export_text().splitlines()
    frame = scaling_frame(found)
    assert list(frame["num_gpus"]) == [8, 16, 16, 32, 64]
    assert list(frame["remark"]) == ["", "", *["out of memory"] * 3]
    (chart,) = scaling_charts(found.curves, {})
    assert chart.caption.endswith(" a: not in the number of 16 GPUs: out of memory.")
    assert len(chart.marks) == len(chart.data.rows) == 4


def test_jobs_of_one_size_that_left_no_number_are_counted_under_the_newest() -> None:
    plan = full()
    jobs = [
        JobReport(
            id=str(number),
            recipe=plan.asked,
            scale="full",
            modified=(),
            num_ranks=8,
            repeat=0,
            started_at=f"2026-11-2{number}",
            state=state,
            reason="",
            record=None,
            log=None,
            plan=plan,
        )
        for number, state in ((2, JobState.TIMED_OUT), (1, JobState.OUT_OF_MEMORY))
    ]
    (point,) = missing_points(jobs)
    assert (point.reason, point.num_jobs) == ("timed out", 2)
    assert missing_text(point) == "timed out (the newest of 2 jobs)"


def test_a_chart_has_a_name_for_more_curves_than_letters() -> None:
    found = curves(
        dataclasses.replace(point, family=f"{number:02}")
        for number in range(30)
        for point in record_points([*runs_at(8, 1.0, batch=512), *runs_at(16, 1.1, batch=1024)])
    )
    (chart,) = scaling_charts(found, {})
    assert [entry.text.split()[0] for entry in chart.legend][24:28] == ["y", "z", "aa", "bb"]


def test_one_number_and_failures_beside_it_are_a_curve() -> None:
    found = scaling_of(runs_at(8, 1.0, batch=512), (), {}, missing=family_of((16,), reason="timed out"))
    (curve,) = found.curves
    assert (curve.mode, curve.sizes) == (Mode.WEAK, (8, 16))


def test_failures_without_any_number_are_named_below_the_curves(tmp_path: Path) -> None:
    found = scaling_of((), (), {}, missing=family_of((16, 32), reason="out of memory"))
    assert found.curves == ()
    assert [point.num_gpus for point in found.missing] == [16, 32]
    frame = scaling_frame(found)
    assert list(frame["remark"]) == ["out of memory"] * 2
    assert frame["tokens_per_s_per_gpu"].isna().all()
    with pytest.raises(BadInputError, match="no scaling curve"):
        write_scaling_plot(found.curves, tmp_path / "x.png")


def test_a_failure_of_another_recipe_belongs_to_no_curve() -> None:
    others = [
        dataclasses.replace(point, recipe_family="another")
        for point in family_of((16, 64), reason="timed out")
    ]
    measured = [*runs_at(8, 1.0, batch=512), *runs_at(32, 1.0, batch=2048)]
    found = scaling_of(measured, (), {}, missing=others)
    assert [curve.missing for curve in found.curves] == [()]
    assert list(found.missing) == others
    # one size alone is no family: `moe-bench jobs` tells of it
    assert scaling_of(measured, (), {}, missing=others[:1]).missing == ()


def test_table_and_plot_show_the_reason_at_its_size(tmp_path: Path) -> None:
    found = scaling_of(
        [*runs_at(8, 1.0, batch=512), *runs_at(32, 1.1, batch=2048)],
        (),
        {},
        missing=family_of((16,), reason="killed by signal 9"),
    )
    frame = scaling_frame(found)
    assert list(frame["num_gpus"]) == [8, 16, 32]
    assert frame["remark"][1] == "killed by signal 9"
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(scaling_view(found))
    (line,) = [line for line in console.export_text().splitlines() if "killed by" in line]
    assert line.split("killed by signal 9")[1].split()[:5] == ["16", "1024", "-", "-", "-"]
    write_scaling_plot(found.curves, tmp_path / "scaling.svg")
    write_scaling_plot(found.curves, tmp_path / "scaling.png")
    (chart,) = scaling_charts(found.curves, {})
    (cross,) = [mark for mark in chart.marks if mark.role == "missing"]
    assert cross.tip == "16 GPUs, no number: killed by signal 9"
    assert len(chart.marks) == len(chart.data.rows) == 3
