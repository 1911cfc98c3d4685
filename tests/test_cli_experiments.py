"""Repeats and experiments on the command line: what is queued, in which order, and what is refused."""

import importlib.util
import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_bench.cli import main
from moe_bench.launch.verbs import Outcome
from moe_bench.results.record import Record
from tests.results.records import record

SUBMIT = ["submit", "qwen3_30b_a3b/h100_sxm_16g_bf16_alltoall", "--site", "default", "--dry-run"]


def what_runs(line: str) -> str:
    """What follows the script in a line of `submit --dry-run`."""
    words = shlex.split(line)
    script = next(index for index, word in enumerate(words) if word.endswith("run_recipe.sh"))
    return " ".join(words[script + 2 :])


def test_an_experiment_is_submitted_interleaved(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SUBMIT, "--vary", "dispatcher=alltoall,allgather", "--repeats", "2"]) == 0
    lines = [what_runs(line) for line in capsys.readouterr().out.splitlines()]
    change = "--scale full --set dispatch.dispatcher="
    assert lines == [
        f"{change}alltoall --site default",
        f"{change}allgather --site default",
        f"{change}alltoall --repeat 1 --site default",
        f"{change}allgather --repeat 1 --site default",
    ]


def test_an_experiment_as_json_is_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SUBMIT, "--repeats", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 3
    assert main([*SUBMIT, "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)


def test_an_illegal_variant_is_refused_before_anything_is_queued(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*SUBMIT, "--vary", "parallel.expert=16,48"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--set parallel.expert=48" in captured.err


FAMILY = ["submit", "deepseek_v3/h100_sxm_1024g_bf16", "--site", "default", "--dry-run", "--num-gpus"]


def test_a_family_is_submitted_with_a_recipe_file_for_each_member(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*FAMILY, "512,1024", "--repeats", "2"]) == 0
    lines = [what_runs(line) for line in capsys.readouterr().out.splitlines()]
    folder, once = "families/deepseek_v3", "--scale full"
    small, own = "h100_sxm_512g_bf16_weak_of_1024g.yaml", "h100_sxm_1024g_bf16.yaml"
    assert lines == [f"{once} --site default"] * 2 + [f"{once} --repeat 1 --site default"] * 2
    assert main([*FAMILY, "512,1024", "--json"]) == 0
    commands = [" ".join(job["command"]) for job in json.loads(capsys.readouterr().out)]
    assert [f"{folder}/{name}" in command for name, command in zip((small, own), commands, strict=True)]
    assert list(tmp_path.iterdir()) == []


def test_the_members_that_were_submitted_pass_check_and_name_their_origin(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted = []
    monkeypatch.setattr(
        "moe_bench.launch.verbs.submit_verb",
        lambda planned, job, **_: submitted.append(planned.plan) or Outcome(),
    )
    monkeypatch.setattr("moe_bench.harness.requirements.require_runnable", lambda arguments: None)
    asked = [word for word in FAMILY if word != "--dry-run"]
    folder = str(tmp_path / "fam")
    assert main([*asked, "512,64,2048", "--strong", "--vary", "seed=1,2", "--families", folder]) == 0
    refused = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in refused] == ["--num-gpus 64"] * 2
    assert all(line.endswith("use 512 GPUs, or EP8; nearest legal sizes: 512") for line in refused)
    assert [plan.recipe.run_name for plan in submitted] == [
        f"h100_sxm_{size}g_bf16_strong_of_1024g_seed_{seed}" for size in (512, 2048) for seed in (1, 2)
    ]
    assert {plan.recipe.global_batch_size for plan in submitted} == {16384}
    assert main(["check", folder]) == 0
    assert capsys.readouterr().out == "4 recipes, all legal\n"
    text = (tmp_path / "fam/deepseek_v3/h100_sxm_512g_bf16_strong_of_1024g_seed_1.yaml").read_text()
    assert text.startswith("# deepseek_v3/h100_sxm_1024g_bf16 after seed=1, on 512 GPUs by strong scaling: ")
    assert "  changes: [seed=1]\n" in text


def without_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_BENCH_PYTHON", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_a_job_that_would_end_in_its_first_second_is_refused_before_any_is_queued(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_transformer_engine(monkeypatch)
    monkeypatch.setattr("moe_bench.launch.verbs.submit_verb", lambda *_, **__: pytest.fail("queued"))
    asked = [word for word in SUBMIT if word != "--dry-run"]
    assert main([*asked, "--vary", "kernels.family=torch_native,transformer_engine"]) == 3
    said = capsys.readouterr().err
    assert "transformer_engine is not installed" in said
    assert said.endswith("nothing was queued\n")


def test_a_dry_run_prints_the_command_of_a_job_that_would_be_refused_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_transformer_engine(monkeypatch)
    assert main([*SUBMIT, "--repeats", "2"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 2
    assert captured.err.splitlines() == [
        "would be refused: qwen3_30b_a3b/h100_sxm_16g_bf16_alltoall: kernels.family: transformer_engine is "
        "not installed; use the container, `pip install moe_bench[transformer-engine]`, or "
        "--set kernels.family=torch_native"
    ]


@pytest.mark.parametrize("changes", [(), ("--set", "steps.num_warmup=3")])
def test_what_an_image_holds_is_not_asked_of_this_machine_but_what_runs_nowhere_is_refused(
    changes: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_transformer_engine(monkeypatch)
    asked = ["submit", "qwen3_30b_a3b/h100_sxm_16g_bf16", "--site", "example_pyxis", "--dry-run"]
    assert main([*asked, *changes]) == 0
    said = capsys.readouterr().err
    assert ("the capture would be timed; write steps.num_warmup: 4 or more" in said) == bool(changes)
    assert "not installed" not in said


def test_a_family_without_a_legal_member_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FAMILY, "64,96"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.split(":")[0] for line in captured.err.splitlines()] == ["--num-gpus 64", "--num-gpus 96"]


def test_strong_needs_a_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SUBMIT, "--strong"]) == 2
    assert "--strong says how --num-gpus scales" in capsys.readouterr().err


def test_the_toy_of_a_family_has_its_sizes_too(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["show", "qwen3_30b_a3b", "--scale", "smoke", "--num-gpus", "4", "--json"]
    assert main(asked) == 0
    weak = json.loads(capsys.readouterr().out)
    assert main([*asked, "--strong"]) == 0
    strong = json.loads(capsys.readouterr().out)
    # the toy of two processes has 4 micro batches of 1 sequence for each of them
    assert [plan["recipe"]["global_batch_size"] for plan in (weak, strong)] == [16, 8]
    rows = {row["field"]: (row["asked"], row["used"], row["why"]) for row in strong["substitutions"]}
    assert rows["parallel.num_gpus"] == ("16", "4", "--num-gpus")
    assert rows["global_batch_size"][1:] == ("8", "--num-gpus")
    assert weak["asked"] == "qwen3_30b_a3b/h100_sxm_16g_bf16"


def test_a_rank_cannot_repeat_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert main(["run", "qwen3_30b_a3b", "--scale", "smoke", "--repeats", "2"]) == 2
    assert "use submit --repeats" in capsys.readouterr().err


def test_every_repeat_has_a_record_and_the_last_line_says_what_lies_between_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(plan: object, *, repeat: int, **_: object) -> Record:
        return record(step_times_s=((0.1,) * 10,) * 2, repeat=repeat)

    monkeypatch.setitem(sys.modules, "moe_bench.harness.measure", SimpleNamespace(measure=measure))
    asked = ["run", "qwen3_30b_a3b/h100_sxm_8g_bf16", "--scale", "smoke", "--repeats", "3"]
    assert main([*asked, "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(list(tmp_path.rglob("*.json"))) == 3
    assert [line.split(":")[0] for line in lines if line.startswith("run ")] == ["run 2", "run 3"]
    assert lines[-1].startswith("3 runs: 5,120 tokens/s/process, 5,120 to 5,120 between runs")


def test_a_profiler_goes_with_every_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SUBMIT, "--profile", "nsys", "--profile-steps", "2"]) == 0
    asked = "--scale full --profile nsys --profile-steps 2 --site default"
    assert [what_runs(line) for line in capsys.readouterr().out.splitlines()] == [asked]
