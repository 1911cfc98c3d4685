"""What trackers are given is what their own readers find; one that is not installed ends with code 3."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_bench.cli import main
from moe_bench.errors import BadInputError
from moe_bench.report.export.points import points
from moe_bench.report.export.tracker import outcome, settings
from moe_bench.results.record import Record
from moe_bench.results.store import write_record
from tests.results.records import full, record

FOUND = record(full(("seed=1",)), step_times_s=((2.0, 4.0, 2.0), *((1.0, 1.0, 1.0),) * 7))


def by_tag(found: Record) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for one in points(found):
        curves.setdefault(one.tag, []).append((one.step, one.value))
    return curves


def test_settings_name_the_recipe_as_run_and_the_outcome_has_numbers_only() -> None:
    told = settings(FOUND)
    assert told["recipe"] == "qwen3_30b_a3b/h100_sxm_8g_bf16"
    assert told["modified"] == "seed=1"
    assert told["parallel.expert"] == "8"
    assert told["packages.torch"] == "2.15.0"
    assert outcome(FOUND)["step_time_s"] == 2.0
    assert "has_settled" not in outcome(FOUND)
    assert "mfu_fraction" not in outcome(record())


def test_tensorboards_own_reader_finds_every_value(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from moe_bench.report.export.tensorboard import write_events

    run = write_events(FOUND, tmp_path, record_id="one")
    assert run == tmp_path / "qwen3_30b_a3b" / "h100_sxm_8g_bf16" / "one"
    reader = EventAccumulator(str(run))
    reader.Reload()
    read = {
        tag: [(event.step, pytest.approx(event.value)) for event in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }
    assert read == by_tag(FOUND)
    assert next(event.wall_time for event in reader.Scalars("loss")) == 1795330801.0
    (text,) = reader.Tensors("settings")
    assert "| parallel.expert | 8 |" in text.tensor_proto.string_val[0].decode()
    with pytest.raises(BadInputError, match="is there already"):
        write_events(FOUND, tmp_path, record_id="one")


def test_mlflows_own_client_finds_every_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    from moe_bench.report.export.mlflow import write_mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for record_id in ("one", "two"):  # the experiment is made once
        run_id = write_mlflow(FOUND, "nightly", record_id=record_id)
    client = mlflow.MlflowClient()
    run = client.get_run(run_id)
    assert (run.info.run_name, run.info.status) == ("two", "FINISHED")
    assert run.info.start_time == 1795330801000
    assert run.data.params["parallel.expert"] == "8"
    assert run.data.metrics["outcome/step_time_s"] == 2.0
    for tag, values in by_tag(FOUND).items():
        read = client.get_metric_history(run_id, tag)
        assert sorted((one.step, one.value) for one in read) == values


def test_mlflow_that_cannot_be_reached_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    path = write_record(tmp_path / "results", FOUND)
    assert main(["results", "export", str(path), "--mlflow", "nightly"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("MLflow: ")


def test_weights_and_biases_writes_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    from moe_bench.report.export.wandb import write_wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run_id = write_wandb(FOUND, "nightly", record_id="one")
    wandb.teardown()  # as at the end of a process: its service writes the rest of the file
    (path,) = tmp_path.glob(f"wandb/offline-run-*/run-{run_id}.wandb")
    steps: dict[str, list[tuple[int, float]]] = {}
    for item in offline_history(path):
        step = int(item.pop("_step"))
        for tag, value in item.items():
            steps.setdefault(tag, []).append((step, value))
    assert {tag: steps[tag] for tag in by_tag(FOUND)} == by_tag(FOUND)


def offline_history(path: Path) -> list[dict[str, float]]:
    """The history of a `.wandb` file: a log as LevelDB writes it, of W&B's own protocol buffers."""
    import json

    from wandb.proto.wandb_internal_pb2 import Record as Message

    data, place, parts, found = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole message, or the last part of one
            message = Message.FromString(parts)
            if message.HasField("history"):
                items = {item.key or ".".join(item.nested_key): item for item in message.history.item}
                found.append({key: json.loads(item.value_json) for key, item in items.items()})
            parts = b""
    return found


@pytest.mark.parametrize("option", ["--tensorboard", "--mlflow", "--wandb"])
def test_a_tracker_that_is_not_installed_ends_with_3_and_one_line_before_anything_runs(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, option.removeprefix("--"), None)
    path = write_record(tmp_path, FOUND)
    for command in (["results", "export", str(path)], ["run", "qwen3_30b_a3b", "--scale", "smoke"]):
        assert main([*command, option, str(tmp_path / "there")]) == 3
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.endswith(f"is not installed here; pip install 'moe_bench[{option.removeprefix('--')}]'")
    assert not (tmp_path / "there").exists()


def test_a_run_is_exported_when_it_is_over_and_all_that_are_chosen_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    stub = SimpleNamespace(measure=lambda plan, *, repeat, **_: record(repeat=repeat))
    monkeypatch.setitem(sys.modules, "moe_bench.harness.measure", stub)
    run = ["run", "qwen3_30b_a3b/h100_sxm_8g_bf16", "--scale", "smoke", "--repeats", "2", "--json"]
    assert main([*run, "--out", str(tmp_path / "results"), "--tensorboard", str(tmp_path / "tb")]) == 0
    assert len(list((tmp_path / "tb").rglob("events.out.tfevents.*"))) == 2
    capsys.readouterr()
    chosen = ["results", "--results", str(tmp_path / "results"), "--scale", "smoke"]
    assert main([*chosen, "export", "--tensorboard", str(tmp_path / "again")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main([*chosen, "export"]) == 2


def test_a_submitted_run_is_exported_in_its_job(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = ["submit", "qwen3_30b_a3b/h100_sxm_16g_bf16_alltoall", "--site", "default", "--dry-run"]
    assert main([*submit, "--tensorboard", "my runs"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("--scale full --tensorboard 'my runs' --site default")
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main([*submit, "--wandb", "moe"]) == 3
