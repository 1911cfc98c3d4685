"""The verb as a user meets it: one rank, every stage, a plot, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from moe_bench.analysis.params import rank_params
from moe_bench.cli import main
from moe_bench.spec.catalogue import find_recipe
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Recipe
from tests.harness.dryrun.conftest import LOADER

SMALL = "moonlight_16b_a3b/h100_sxm_8g_bf16_gbs4"
STAGES = ["mixtral_8x7b", "--set", "parallel.virtual_pipeline=1", "--set", "overlap.p2p=false"]


def recipe_of(name: str, loader: Loader = LOADER) -> Recipe:
    return loader.recipe(find_recipe(name, loader))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "moe_bench", "dryrun", *arguments)
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_one_rank_is_printed_with_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dryrun", SMALL, "--rank", "3"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "unverified: no figure here has been compared with a GPU",
        "kernels.family transformer_engine torch_native",
        "rank 3, pipeline rank 0",
        "micro batches: 1 run of 1",
        "kernels: norms fused into projections, MLA's values unpadded (unverified)",
        "grouped GEMM",
        "reduce_scatter DPxCP",
        "kernels stood in for",
    ):
        assert part in text


def test_every_stage_is_run_in_processes_of_their_own_and_drawn(tmp_path: Path) -> None:
    path = tmp_path / "memory.svg"
    done = run(*STAGES, "--all-stages", "--json", "--plot", str(path))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["is_compared_with_gpu"]
    assert [rank["run"]["pipeline_rank"] for rank in found["ranks"]] == [0, 1, 2, 3]
    recipe = recipe_of("mixtral_8x7b")
    recipe = recipe.model_copy(
        update={"parallel": recipe.parallel.model_copy(update={"virtual_pipeline": 1})}
    )
    for rank in found["ranks"]:
        counted = rank_params(recipe, rank["run"]["pipeline_rank"])
        assert rank["run"]["num_expert_params"] == counted.expert
        assert rank["run"]["num_dense_params"] == counted.dense
        known = [term["num_bytes"] for term in rank["corrections"] if term["num_bytes"] is not None]
        assert rank["corrected_peak_bytes"] == rank["run"]["peak"]["num_bytes"] + sum(known)
    drawing = ElementTree.parse(path).getroot()
    titles = [title.text for title in drawing.iter("{http://www.w3.org/2000/svg}title")]
    assert sum(title is not None and title.startswith("weights: ") for title in titles) == 4
    text = " ".join(element.text or "" for element in drawing.iter("{http://www.w3.org/2000/svg}text"))
    assert "usable 79.1 GiB" in text
    assert "compared with a GPU" in text
    assert len(list(drawing.iter("{http://www.w3.org/2000/svg}polyline"))) == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--rank", "8"], "--rank 8: the recipe has ranks 0 to 7"),
        (["--routing", "gone.json"], "gone.json: No such file or directory"),
        (["--set", "parallel.expert=5"], "parallel.expert"),
        (["--micro-batches", "2"], "--micro-batches 2: a step has 1; use 1 to 1"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dryrun", SMALL, *arguments]) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert captured.out == ""


def test_without_megatron_core_it_says_what_is_missing() -> None:
    code = (
        "import importlib.util as util, sys; find = util.find_spec; "
        "util.find_spec = lambda name, *rest: None if name.startswith('megatron') else find(name, *rest); "
        "from moe_bench.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = (sys.executable, "-c", code, "dryrun", SMALL)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr == "dryrun: megatron.core is not installed; `pip install torch megatron-core`\n"
