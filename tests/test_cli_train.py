"""train and evaluate as a user meets them: a run, the same run gone on with, one line for what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_bench.cli import main
from moe_bench.results.training_run import JOB

TEXT = Path(__file__).parent / "data" / "moby_dick.txt"
RECIPE = ("qwen3_30b_a3b", "--scale", "smoke")
STEPS = ("--steps", "2", "--save-every", "1", "--valid-every", "2", "--valid-batches", "1")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which forks ranks."""
    command = [sys.executable, "-m", "moe_bench", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def only_line(said: subprocess.CompletedProcess[str], *, exit_code: int = 2) -> str:
    """The error, behind the list of what a toy substitutes."""
    assert said.returncode == exit_code, said.stderr
    assert "Traceback" not in said.stderr
    assert said.stdout == ""
    lines = said.stderr.strip().splitlines()
    assert all(not line.startswith("step ") for line in lines)
    return lines[-1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("data") / "moby"
    assert main(["data", "build", str(TEXT), "--split", "paragraph", "--out", str(prefix)]) == 0
    return prefix


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    said = run("train", *RECIPE, "--data", data, "--out", folder, *STEPS, "--json")
    assert said.returncode == 0, said.stderr
    told = json.loads(said.stdout)
    assert told["checkpoint_steps"] == [1, 2]
    assert [step["step"] for step in told["steps"]] == [1, 2]
    return folder


def test_a_run_is_asked_how_good_it_is_on_what_it_held_out(finished: Path) -> None:
    found = run("evaluate", finished, "--json")
    assert found.returncode == 0, found.stderr
    answer = json.loads(found.stdout)
    assert (answer["num_steps"], answer["part"]) == (2, "held_out")
    *_, last = (json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines())
    # the same text cut in other places
    assert answer["loss"] == pytest.approx(last["validation_loss"], rel=0.05)


@pytest.mark.slow
def test_a_run_goes_on_with_more_steps(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    # the scale is that of before; with twice the GPUs the recipe has another name, and is the same one
    more = ("--steps", "3", "--keep", "1", "--set", "parallel.num_gpus=32", "--json")
    said = run("train", RECIPE[0], "--out", folder, "--resume", *more)
    assert said.returncode == 0, said.stderr
    told = json.loads(said.stdout)
    assert [step["step"] for step in told["steps"]] == [1, 2, 3]
    assert told["checkpoint_steps"] == [3]
    assert told["job"]["plan"]["scale"] == "smoke"
    found = run("evaluate", folder, "--json")
    assert json.loads(found.stdout)["num_steps"] == 3, found.stderr


def test_a_run_that_has_ended_is_shown_and_stays_as_it_was(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in finished.glob("*.json*")}
    assert main(["train", RECIPE[0], "--out", str(finished), "--resume", "--json"]) == 0
    assert [step["step"] for step in json.loads(capsys.readouterr().out)["steps"]] == [1, 2]
    assert main(["train", RECIPE[0], "--out", str(finished), "--resume", "--steps", "1"]) == 2
    assert "--steps 1: " in capsys.readouterr().err
    assert {path: path.read_bytes() for path in finished.glob("*.json*")} == before


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("train", *RECIPE, "--out", "new"), "--data: what is there to learn?"),
        (("train", *RECIPE, "--out", "{run}", "--data", "{data}"), "a run is in it; go on with --resume"),
        (("train", *RECIPE, "--out", "new", "--resume"), "new: no run in it"),
        (("train", *RECIPE, "--out", "{run}", "--resume", "--from", "x"), "leave one of the two out"),
        (("train", "olmoe_1b_7b", "--scale", "smoke", "--out", "{run}", "--resume"), "is one of qwen3"),
        (("train", *RECIPE, "--out", "new", "--data", "{data}", "--lora-rank", "4"), "beside which weights?"),
        (("evaluate", "nowhere"), "nowhere: no such folder"),
        (("evaluate", "."), "--data: on what?"),
        (("evaluate", ".", "--data", "x"), "--recipe: what is it a checkpoint of?"),
        (("generate", "{run}", "--prompt", "a", "--top-k", "3"), "--top-k: at temperature 0"),
    ],
)
def test_what_is_asked_wrongly_is_one_line_and_nothing_is_made(
    arguments: tuple[str, ...],
    problem: str,
    finished: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    filled = [argument.format(run=finished, data=data) for argument in arguments]
    assert main(filled) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_dataset_with_more_tokens_than_the_model_is_refused_before_anything_is_made(
    data: Path, tmp_path: Path
) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{data}{suffix}", tmp_path / f"set{suffix}")
    manifest = json.loads(Path(f"{data}.json").read_text())
    manifest["tokenizer"]["vocab_size"] = 60_000
    (tmp_path / "set.json").write_text(json.dumps(manifest))
    said = run("train", *RECIPE, "--data", tmp_path / "set", "--out", tmp_path / "run", *STEPS)
    assert "its tokenizer has 60000 tokens and qwen3_30b_a3b knows 512" in only_line(said)
    assert not (tmp_path / "run" / JOB).exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("evaluate", "{run}", "--data", "{set}"),
        ("train", *RECIPE, "--out", "{run}", "--resume", "--data", "{set}", "--steps", "3"),
    ],
)
def test_text_that_was_tokenized_otherwise_than_what_the_run_has_learned_is_refused(
    arguments: tuple[str, ...],
    finished: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    manifest = json.loads(Path(f"{data}.json").read_text())
    manifest["tokenizer"] |= {"kind": "huggingface", "path": "gone", "fingerprint": "0", "vocab_size": 300}
    (tmp_path / "set.json").write_text(json.dumps(manifest))
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{data}{suffix}", tmp_path / f"set{suffix}")
    assert main([argument.format(run=finished, set=tmp_path / "set") for argument in arguments]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert "set: a tokenizer of 300 tokens (gone); the run has learned those of another, of 258" in last


@pytest.mark.slow
def test_other_tokenizer_files_than_those_of_the_dataset_are_refused(data: Path, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{data}{suffix}", tmp_path / f"set{suffix}")
    manifest = json.loads(Path(f"{data}.json").read_text())
    manifest["tokenizer"] |= {"kind": "huggingface", "path": str(tmp_path / "gone"), "fingerprint": "0"}
    (tmp_path / "set.json").write_text(json.dumps(manifest))
    said = run("train", *RECIPE, "--data", tmp_path / "set", "--out", tmp_path / "run", *STEPS)
    assert "gone: no such folder; name the one that holds tokenizer.json" in only_line(said)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_a_checkpoint_that_does_not_fit_leaves_no_run_behind(
    verb: str, finished: Path, data: Path, tmp_path: Path
) -> None:
    checkpoint = finished / "checkpoints" / "step-0000002"
    change = ("--set", "model.attention.num_query_groups=32")
    if verb == "train":
        begun = ("train", *RECIPE, "--data", data, "--out", tmp_path / "run", *STEPS)
        said = run(*begun, "--from", checkpoint, *change)
    else:
        said = run("evaluate", checkpoint, "--recipe", *RECIPE, "--data", data, *change)
    assert "linear_qkv.weight: [128, 64] was saved" in only_line(said)
    assert not (tmp_path / "run" / JOB).exists()


@pytest.mark.slow
def test_a_cut_off_checkpoint_is_one_line_and_the_run_stays_as_it_was(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    shard = max((folder / "checkpoints" / "step-0000002").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    before = {path: path.read_bytes() for path in folder.glob("*.json*")}
    said = run("train", *RECIPE, "--out", folder, "--resume", "--steps", "3")
    assert "step-0000002: damaged or not whole" in only_line(said)
    assert {path: path.read_bytes() for path in folder.glob("*.json*")} == before
