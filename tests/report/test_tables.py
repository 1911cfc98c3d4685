"""What a reader sees: every mark is there, and nothing that does not exist is a zero."""

from pathlib import Path

from rich.console import Console

from moe_bench.report.frame import as_csv, as_markdown, frame_view, records_frame
from moe_bench.report.tables import run_json, run_rows, run_title, run_view
from tests.results.records import full, one_rank, record


def shown(renderable) -> str:
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_a_smoke_run_cannot_be_mistaken_for_the_recipe() -> None:
    assert run_title(record().plan) == "qwen3_30b_a3b/h100_sxm_8g_bf16 (smoke scale)"
    text = shown(run_view(record(), Path("x.json")))
    assert "substitutions" in text
    assert "model.hidden_size" in text
    assert "none: no peak is known for this machine" in text


def test_a_slice_says_that_it_is_the_compute_of_one_rank() -> None:
    found = record(one_rank(), step_times_s=((0.1, 0.2, 0.1),))
    sent = {"all_to_all EP": 3 * 2**30, "all_reduce TP": 1, "all_gather DPxCP": 2**30, "broadcast TP": 1}
    found = found.model_copy(update={"samples": found.samples.model_copy(update={"stood_in_bytes": sent})})
    assert run_title(found.plan) == "qwen3_30b_a3b/h100_sxm_8g_bf16 (slice scale)"
    rows = dict(run_rows(found))
    assert rows["ran on"].startswith("1 GPU, ")
    assert rows["read as"].startswith("compute of one rank, upper bound")
    assert rows["not sent"].startswith("all_to_all EP 3 GiB, all_gather DPxCP 1 GiB, ")
    assert rows["not sent"].endswith(", 1 smaller per step")
    assert "read as" not in dict(run_rows(record()))


def test_a_changed_recipe_carries_the_mark() -> None:
    title = run_title(full(("parallel.expert=4",)))
    assert title == "qwen3_30b_a3b/h100_sxm_8g_bf16 (modified: parallel.expert=4)"


def test_the_table_names_what_ran() -> None:
    rows = dict(run_rows(record()))
    assert rows["kernels"].startswith("attention torch:masked, experts torch:grouped_mm")
    assert rows["ran on"] == "2 processes, EP2 DP2"
    assert rows["loss"] == "6.3000 -> 6.0000"


def test_substitutions_that_are_on_the_screen_are_not_shown_again() -> None:
    made = record()
    assert "toy size, same structure" in shown(run_view(made, Path("x.json")))
    again = shown(run_view(made, Path("x.json"), was_announced=True))
    assert "toy size" not in again
    assert "step time" in again


def test_json_has_units_in_its_names_and_every_substitution() -> None:
    data = run_json(record(), Path("x.json"))
    assert data["mfu_fraction"] is None
    assert data["flops_counting"] == "mcore-windowed"
    assert len(data["substitutions"]) == len(record().plan.substitutions)


def test_many_records_make_one_table_in_three_formats() -> None:
    frame = records_frame((record(job_id="b"), record(full(), step_times_s=((10.0,),) * 8)))
    assert list(frame["scale"]) == ["full", "smoke"]
    assert "| recipe |" in as_markdown(frame)
    assert as_markdown(frame).count("\n") == 3
    assert as_csv(frame).splitlines()[0].startswith("recipe,scale,modified,ranks")
    text = shown(frame_view(frame))
    assert "qwen3_30b_a3b/h100_sxm_8g_bf16" in text
    # the smoke run's MFU is a dash
    assert " - " in text


def test_a_number_whose_settings_nobody_compared_is_unproven() -> None:
    frame = records_frame((record(),))
    assert list(frame["parity"]) == ["unproven"]
    assert "unproven: nobody has shown" in shown(frame_view(frame))
    table = shown(run_view(record(), Path("x.json")))
    assert "moe-bench parity --plain qwen3_30b_a3b/h100_sxm_8g_bf16" in table


def test_no_records_make_an_empty_table() -> None:
    assert as_csv(records_frame(())).count("\n") == 1
    assert "no record there" in shown(frame_view(records_frame(())))


def test_the_table_says_which_steps_were_steady_and_which_were_far_off() -> None:
    slow_start = ((2.0, 1.5, 1.2, 1.1, 1.0, *[1.0] * 14, 7.0),)
    rows = dict(run_rows(record(step_times_s=slow_start)))
    assert rows["step time"].endswith("median of 18 of 20 steps, steady from step 3")
    # steps 1 and 2 are far off, too, but they do not count
    assert rows["outlier steps"] == "3: 1.2 s, 4: 1.1 s, 20: 7 s (counted)"
    drift = dict(run_rows(record(step_times_s=(tuple(1 + 0.05 * step for step in range(20)),))))
    assert drift["step time"].endswith("which drift: NOT STEADY")
    assert "outlier steps" not in drift
    few = dict(run_rows(record(step_times_s=((1.0, 1.0),))))
    assert few["step time"].endswith("too few to tell whether it is steady")
