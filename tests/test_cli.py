"""The command line as a user meets it: what it prints, what it refuses, and with which exit code."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_bench import __version__
from moe_bench.cli import VERBS, app_with, main
from moe_bench.cli.options import whole_numbers
from moe_bench.errors import EXIT_CODES, BadInputError, MeasurementError
from moe_bench.results.store import write_record
from moe_bench.spec.catalogue import recipes_root
from tests.results.records import record
from tests.spec.conftest import RECIPE


def test_help_groups_the_verbs_and_lists_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for verb in ("list", "show", "check", "schema", "run", "submit", "report"):
        assert f" {verb} " in text
    panels = [text.index(f"─ {panel} ─") for panel in ("Recipes", "Predict", "Run", "Read")]
    assert panels == sorted(panels)
    for code, meaning in EXIT_CODES:
        assert f"{code} {meaning}" in text


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_list_names_every_recipe_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "deepseek_v3", "--json"]) == 0
    names = [line["name"] for line in json.loads(capsys.readouterr().out)]
    assert "deepseek_v3/h100_sxm_256g_bf16" in names
    assert "deepseek_v3/h100_sxm_1024g_bf16" in names
    assert all(name.startswith("deepseek_v3/") for name in names)


def test_check_tells_legal_recipes_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "deepseek_v3"]) == 0
    assert capsys.readouterr().out == "1 recipe, legal\n"
    assert main(["check", "recipes/deepseek_v3", "--scale", "smoke"]) == 0
    assert capsys.readouterr().out.endswith(" recipes, all legal\n")


def test_check_says_what_is_legal_and_yet_refused_by_run(capsys: pytest.CaptureFixture[str]) -> None:
    graphs = ["check", "qwen3_30b_a3b/gb200_nvl72_8g_mxfp8"]
    assert main(graphs) == 0
    captured = capsys.readouterr()
    assert captured.out == "1 recipe, legal\n"
    assert captured.err.startswith(f"legal, but run refuses {graphs[1]}: cuda_graphs.implementation: ")
    assert main(["check", "qwen3_30b_a3b/h100_sxm_16g_bf16"]) == 0
    assert capsys.readouterr().err == ""


def test_check_ends_with_two_and_one_line_per_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "deepseek_v3", "--set", "parallel.expert=48"]) == 2
    *lines, summary = capsys.readouterr().out.splitlines()
    assert all(line.startswith("--set parallel.expert=48: parallel.expert: ") for line in lines)
    assert summary == f"{len(lines)} problems in 1 of 1 recipe"
    assert main(["check", "tests/recipes_impossible", "--json"]) == 2
    checked = json.loads(capsys.readouterr().out)
    assert (checked["num_recipes"], checked["num_refused"]) == (13, 13)
    assert {mistake["key"] for mistake in checked["mistakes"]} == {"parallel.expert"}


def test_whole_numbers_are_listed_with_commas() -> None:
    assert whole_numbers("64, 1_024,64", option="--num-gpus", example="64") == (64, 1024, 64)


@pytest.mark.parametrize("text", ["", "64,", "0", "64;128", "-8", "²"])
def test_what_is_no_list_of_whole_numbers_is_refused(text: str) -> None:
    with pytest.raises(BadInputError, match=f"--num-gpus {text}: write whole numbers, as 64,128"):
        whole_numbers(text, option="--num-gpus", example="64,128")


def test_every_verb_is_found_in_the_module_that_the_table_names() -> None:
    app = app_with()
    found = [(command.callback, command.name) for command in app.registered_commands]
    for group in app.registered_groups:
        found += [(command.callback, group.name) for command in group.typer_instance.registered_commands]
    assert {(callback.__module__, name or callback.__name__) for callback, name in found} == {
        (f"moe_bench.cli.{module}", verb) for module, verbs in VERBS.items() for verb in verbs
    }


def test_show_gives_total_and_active_parameters_beside_the_published(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["show", "deepseek_v3", "--params", "--json"]) == 0
    size = json.loads(capsys.readouterr().out)
    assert size["published_total"] == 671_000_000_000
    assert abs(size["total_ratio"] - 1) < 0.01
    assert abs(size["active_ratio"] - 1) < 0.08
    assert size["nearest_active"] in size["active"]


def test_show_says_where_routing_is_not_causal(capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for model in ("olmoe_1b_7b_expert_choice", "olmoe_1b_7b_switch"):
        assert main(["show", model]) == 0
        said.append("not causal: a token's experts depend on tokens behind it" in capsys.readouterr().out)
    assert said == [True, False]


def test_show_prints_the_memory_of_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "deepseek_v3"]) == 0
    text = capsys.readouterr().out
    assert "memory per GPU from the closed form: fits" in text
    assert "automodel-deepseek-v3-h100-256gpu-bf16-s4096" in text


def test_show_prints_what_megatron_core_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "deepseek_v3", "--megatron", "--json"]) == 0
    sections = json.loads(capsys.readouterr().out)
    assert sections["MLATransformerConfig"]["pipeline_model_parallel_layout"] == "Et|(tt|)*30L"
    assert sections["OptimizerConfig"]["exp_avg_dtype"] == "bf16"


def test_a_change_is_shown_and_marked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "qwen3_30b_a3b", "--set", "steps.num_timed=7", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["recipe"]["steps"]["num_timed"] == 7
    assert plan["modified"] == ["steps.num_timed=7"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "deepseek_v3", "--params", "--memory"], "--params, --memory: each prints something else"),
        (["check", "--rules", "--all"], "--rules, --all"),
        (["published", "--csv", "--json"], "--csv, --json"),
        (["published", "--trust", "Z"], "'Z' is not one of 'A', 'B', 'C'"),
        (["results", "--csv", "--json"], "--csv, --json"),
        (["report", "--layers", "--format", "csv"], "--layers, --format"),
        (["report", "--scaling", "--json", "--format", "csv"], "--json, --format"),
        (["list", "deepseek_v3/h100_sxm_256g_bf16"], "no model with recipes"),
        (["show", "deepseek_v3", "--scale", "smoke", "--stage", "1"], "are of a slice; add --scale slice"),
        (["show", "deepseek_v3", "--num-gpus", "512", "--kernels", "quack"], "are of a slice"),
        (["h100", "--plan", "--resume"], "go on measuring"),
        (["audit", "deepseek_v3", "--tokens-per-s-per-gpu", "inf"], "--tokens-per-s-per-gpu"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_what_would_be_ignored_is_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert (captured.out, words in captured.err) == ("", True)


def test_an_option_that_breaks_every_recipe_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "recipes/deepseek_v3", "--set", "no_such_key=1"]) == 2
    assert capsys.readouterr().out.count("--set no_such_key=1: no_such_key") == 1


def test_an_unknown_recipe_offers_the_nearest_and_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "depseek_v3"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("there is no recipe 'depseek_v3'; did you mean 'deepseek_v3'")


def test_a_broken_file_is_one_line_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = RECIPE.replace("tiny", "qwen3_30b_a3b").replace("micro_batch_size", "micro_bacth_size")
    Path("broken.yaml").write_text(text)
    assert main(["show", "broken.yaml"]) == 2
    assert capsys.readouterr().err == (
        "broken.yaml:6: micro_bacth_size: unknown key; did you mean 'micro_batch_size'?\n"
    )


def test_check_refuses_a_row_that_nobody_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = recipes_root() / "mixtral_8x7b" / "h100_sxm_64g_bf16.yaml"
    monkeypatch.chdir(tmp_path)
    Path(source.name).write_text(f"reproduces: zoo-mixtral-8x22b-h100\n{source.read_text()}")
    assert main(["check", source.name]) == 2
    assert capsys.readouterr().out.startswith(
        f"{source.name}:1: reproduces: there is no published row of mixtral_8x7b 'zoo-mixtral-8x22b-h100'; "
        "did you mean '"
    )


def test_check_names_what_a_recipe_does_not_say_of_its_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = recipes_root() / "qwen3_30b_a3b" / "h100_sxm_16g_bf16.yaml"
    monkeypatch.chdir(tmp_path)
    text = source.read_text().replace("global_batch_size: 1024", "global_batch_size: 2048")
    Path(source.name).write_text(text)
    assert main(["check", source.name]) == 2
    assert "gbs: the row has 1024, the recipe 2048 and no difference says so" in capsys.readouterr().out
    Path(source.name).write_text("".join(re.split(r"reproduces: .*\n", text)))
    assert main(["check", source.name]) == 2
    assert "differences: stated without a row; name it in reproduces" in capsys.readouterr().out
    assert main(["check", "qwen3_30b_a3b/h100_sxm_16g_bf16", "--set", "global_batch_size=2048"]) == 0


@pytest.mark.parametrize(
    "arguments", [["show"], ["frobnicate"], ["list", "--frobnicate"], ["run", "x", "--scale", "y"]]
)
def test_a_wrong_command_line_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err


def test_a_recipe_for_gpus_says_what_is_missing_here_and_exits_3(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "deepseek_v3"]) == 3
    assert "deepseek_v3/h100_sxm_256g_bf16 needs 256 GPUs" in capsys.readouterr().err


def test_a_slice_without_a_gpu_exits_3_and_is_never_queued(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "deepseek_v3", "--scale", "slice"]) == 3
    assert "with --scale tiny_slice" in capsys.readouterr().err
    assert main(["submit", "deepseek_v3", "--scale", "slice"]) == 2
    assert "a slice is one process" in capsys.readouterr().err


def test_what_a_failed_rank_wrote_is_shown_below_the_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        error = MeasurementError("rank 1 died in step 2 (signal 9)")
        error.add_note("Traceback of rank 1")
        raise error

    monkeypatch.setattr("moe_bench.spec.schema.recipe_file_schema", fail)
    assert main(["schema"]) == 1
    assert capsys.readouterr().err == "rank 1 died in step 2 (signal 9)\nTraceback of rank 1\n"


def test_a_node_needs_a_number_of_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "deepseek_v3", "--scale", "node"]) == 2
    assert "add --num-gpus N" in capsys.readouterr().err
    assert main(["show", "deepseek_v3", "--scale", "tiny_slice", "--num-gpus", "8"]) == 2
    assert "--num-gpus: a tiny_slice is one rank" in capsys.readouterr().err


def test_what_is_chosen_of_a_slice_belongs_to_slices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", "qwen3_30b_a3b", "--kernels", "quack"]) == 2
    assert "are of a slice; add --scale slice" in capsys.readouterr().err
    sliced = ["show", "qwen3_30b_a3b", "--scale", "slice"]
    assert main([*sliced, "--routing", "skewed"]) == 2
    assert (
        "--routing skewed: unknown; write balanced, random, natural, or a JSON file"
        in capsys.readouterr().err
    )
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps([[1] * 64]))
    assert main([*sliced, "--routing", str(trace)]) == 2
    assert "routing.trace: at slice scale 64 experts in layer 0: " in capsys.readouterr().err
    trace.write_text(json.dumps([[1] * 128]))
    assert main([*sliced, "--routing", str(trace), "--kernels", "torch_native", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["recipe"]["routing"]["mode"], shown["recipe"]["kernels"]["family"]) == (
        "recorded",
        "torch_native",
    )
    assert shown["whole"]["routing"]["mode"] != "recorded"


def test_report_reads_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(tmp_path, record())
    assert main(["report", str(tmp_path), "--format", "csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("qwen3_30b_a3b/h100_sxm_8g_bf16,smoke,")


def test_a_damaged_record_is_refused_where_it_was_named_and_skipped_in_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    path.write_text("{")
    assert main(["report", str(path)]) == 2
    assert "x.json: not a result file" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 0
    assert f"skipped {path}: not a result file" in capsys.readouterr().err
    assert main(["compare", str(tmp_path), str(tmp_path)]) == 2


def test_the_schema_knows_every_key_and_refuses_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["additionalProperties"] is False
    assert schema["properties"]["model"]["type"] == "string"
    assert "description" in schema["$defs"]["ParallelSpec"]["properties"]["layout"]


@pytest.mark.parametrize(
    "command",
    [
        ["list"],
        ["show", "deepseek_v3"],
        ["audit", "deepseek_v3"],
        ["published", "--model", "deepseek_v3"],
        ["published", "--check"],
        ["submit", "deepseek_v3", "--dry-run", "--set", "container=null"],
    ],
)
def test_a_light_verb_imports_neither_torch_nor_pandas(command: list[str]) -> None:
    code = (
        "import sys; from moe_bench.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'megatron', 'pandas', 'numpy', 'scipy'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [["report"], ["reproduce", "--results"], ["compare", "."]], ids=str)
def test_a_verb_that_reads_results_does_not_import_torch(command: list[str], tmp_path: Path) -> None:
    write_record(tmp_path, record())
    code = (
        "import sys; from moe_bench.cli import main; code = main(sys.argv[1:]); "
        "sys.exit('loaded torch' if 'torch' in sys.modules else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command, str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
