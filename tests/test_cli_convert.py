"""The verb that converts checkpoints, at smoke size: there and back, and what is wrong in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_bench.checkpoints.family import family_of
from moe_bench.cli import main
from moe_bench.spec.catalogue import find_recipe
from moe_bench.spec.scale import smoke_plan
from tests.harness.convert.checkpoints import (
    LOADER,
    random_tensors,
    read_folder,
    rules_of,
    same_bits,
    write_folder,
)

KEY = "mixtral_8x7b"
TOY = smoke_plan(LOADER.recipe(find_recipe(KEY, LOADER)), host=LOADER.system("cpu_host"), modified=()).recipe
OF = ("--model", KEY, "--scale", "smoke")


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    return write_folder(
        tmp_path / "theirs", random_tensors(rules_of(TOY)), family_of(TOY.model).config(TOY.model)
    )


def test_a_checkpoint_goes_there_and_back(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, again = theirs.with_name("ours"), theirs.with_name("again")
    assert main(["convert", str(theirs), str(ours), *OF, "--to", "megatron"]) == 0
    shown = capsys.readouterr()
    assert f"written to {ours}" in shown.out
    assert "100%: decoder." in shown.err
    more = ("--max-shard-gb", "0.0001", "--json")
    assert main(["convert", str(ours), str(again), *OF, "--to", "huggingface", *more]) == 0
    counts = json.loads(capsys.readouterr().out)
    tensors = read_folder(theirs)
    assert counts["num_huggingface_tensors"] == len(tensors)
    assert counts["num_params"] == sum(tensor.numel() for tensor in tensors.values())
    assert same_bits(read_folder(again), tensors)


@pytest.mark.parametrize("model", ["qwen3_30b_a3b", "mixtral_8x22b"])
def test_another_model_is_told_by_its_config_or_its_tensors(
    model: str, theirs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = theirs.with_name("ours")
    assert main(["convert", str(theirs), str(ours), "--model", model, "--to", "megatron"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "config.json: vocab_size 512, not" in line
    assert not ours.exists()


def test_a_file_that_is_cut_off_is_told_by_a_tensor(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = theirs / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    ours = theirs.with_name("ours")
    assert main(["convert", str(theirs), str(ours), *OF, "--to", "megatron"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"{file}: model.layers.")
    assert "cut off" in line
    assert sorted(path.name for path in theirs.parent.iterdir()) == ["theirs"]


def test_a_source_that_is_the_other_kind_is_refused(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(theirs), str(theirs.with_name("x")), *OF, "--to", "huggingface"]) == 2
    assert "no metadata.json in it" in capsys.readouterr().err
    assert main(["convert", str(theirs.parent), str(theirs.with_name("x")), *OF, "--to", "megatron"]) == 2
    assert "config.json: No such file" in capsys.readouterr().err
