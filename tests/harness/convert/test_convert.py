"""Conversion: bitwise there and back, loaded by the real model under TP2 x EP2, refused in one line."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from moe_bench.checkpoints.config import require_same_config
from moe_bench.checkpoints.family import FAMILIES, family_of
from moe_bench.checkpoints.rule import Place, Rule
from moe_bench.checkpoints.safetensors_folder import logical_tensors, require_match
from moe_bench.errors import BadInputError, MeasurementError, MissingRequirementError
from moe_bench.harness.convert.convert import convert_to_megatron, to_huggingface
from moe_bench.harness.convert.rearrange import global_tensors
from tests.harness.convert.checkpoints import (
    LOADER,
    read_folder,
    rules_of,
    same_bits,
    toy_of,
    write_folder,
    write_toy,
)
from tests.harness.convert.ranks import killed_in_the_middle, rank_loads
from tests.harness.zygote import Zygote

ONE_OF_EACH = {
    LOADER.model(path.parent.name).hf_model_type: path.parent.name
    for path in sorted(LOADER.root.glob("*/model.yaml"))
}
SHARD_BYTES = 100_000


def ignore(rule: Rule) -> None:
    """Progress that nobody watches."""


def to_megatron(source: Path, target: Path, key: str) -> None:
    rules = rules_of(toy_of(key))
    tensors = logical_tensors(source)
    require_match(tensors, rules, folder=source)
    convert_to_megatron(rules, tensors, target, on_tensor=ignore)


def back(source: Path, target: Path, key: str, **more: Any) -> None:
    recipe = toy_of(key)
    options = {"max_shard_bytes": SHARD_BYTES, "on_tensor": ignore} | more
    config = family_of(recipe.model).config(recipe.model)
    to_huggingface(rules_of(recipe), source, target, config=config, **options)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_checkpoint_comes_back_bit_by_bit(model_type: str, tmp_path: Path) -> None:
    key = ONE_OF_EACH[model_type]
    tensors = write_toy(tmp_path / "theirs", key)
    to_megatron(tmp_path / "theirs", tmp_path / "ours", key)
    back(tmp_path / "ours", tmp_path / "again", key)
    assert same_bits(read_folder(tmp_path / "again"), tensors)
    files = [path.stat().st_size for path in (tmp_path / "again").glob("*.safetensors")]
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert len(files) > 1
    assert max(files) < SHARD_BYTES + 3 * largest


@pytest.mark.parametrize(
    "key", ["deepseek_v3", *(pytest.param(k, marks=pytest.mark.slow) for k in ("gpt_oss_20b", "olmoe_1b_7b"))]
)
def test_the_real_model_loads_it_and_what_it_saves_comes_back(
    key: str, tmp_path: Path, zygote: Zygote
) -> None:
    tensors = write_toy(tmp_path / "theirs", key)
    to_megatron(tmp_path / "theirs", tmp_path / "ours", key)
    (tmp_path / "saved").mkdir()
    compared = zygote.fork(2, partial(rank_loads, key, tmp_path, tmp_path / "saved"))
    assert min(compared) > 20
    back(tmp_path / "saved", tmp_path / "again", key)
    assert same_bits(read_folder(tmp_path / "again"), tensors)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_layers_that_were_saved_in_one_tensor_are_found(tmp_path: Path) -> None:
    recipe = toy_of("mixtral_8x7b")
    tensors = write_toy(tmp_path / "theirs", "mixtral_8x7b")
    whole = {key: make() for key, make in global_tensors(rules_of(recipe), tensors.__getitem__).items()}
    layers = [{k.split(".", 3)[3]: v for k, v in whole.items() if f"layers.{n}." in k} for n in range(2)]
    rest = {key: value for key, value in whole.items() if ".layers." not in key}
    for name, saved in {"ours": layers, "deeper": [*layers, layers[0]]}.items():
        stacked = {f"decoder.layers.{key}": torch.stack([layer[key] for layer in saved]) for key in saved[0]}
        dcp.save(rest | stacked, checkpoint_id=tmp_path / name, no_dist=True)
        save_config(CheckpointingConfig("torch_dist", 1), str(tmp_path / name))
    back(tmp_path / "ours", tmp_path / "again", "mixtral_8x7b")
    assert same_bits(read_folder(tmp_path / "again"), tensors)
    with pytest.raises(BadInputError, match="of 3 layers, but the model has 2"):
        back(tmp_path / "deeper", tmp_path / "other", "mixtral_8x7b")


@pytest.mark.parametrize("key", ["deepseek_v3", "gpt_oss_20b"])
def test_transformers_loads_what_was_written(key: str, tmp_path: Path) -> None:
    tensors = write_toy(tmp_path / "theirs", key)
    to_megatron(tmp_path / "theirs", tmp_path / "ours", key)
    back(tmp_path / "ours", tmp_path / "again", key)
    network, info = AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    # its classes leave prediction modules out; those of the toy are where they do not look for them
    num_layers = toy_of(key).model.num_layers
    assert all(name.startswith(f"model.layers.{num_layers}.") for name in info["unexpected_keys"])
    assert torch.equal(network.lm_head.weight, tensors["lm_head.weight"])
    require_same_config(
        toy_of(key).model, family_of(toy_of(key).model).config(toy_of(key).model), network.config.to_dict(),
        path=tmp_path,
    )  # fmt: skip


NUM_FILES = 12
ROWS, COLUMNS, PER_FILE = 512, 512, 8


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Rule], int]:
    """A checkpoint of 12 files of 4 MiB, its map, and the bytes of one file."""
    folder = tmp_path_factory.mktemp("large") / "theirs"
    place = Place(megatron="", huggingface="")
    names = [f"t{index:03d}" for index in range(NUM_FILES * PER_FILE)]
    shape = (ROWS, COLUMNS)
    value = torch.zeros(shape, dtype=torch.bfloat16)
    folder.mkdir()
    places = {}
    for number in range(NUM_FILES):
        file = f"model-{number:05d}.safetensors"
        own = names[number * PER_FILE : (number + 1) * PER_FILE]
        save_file({name: value.clone() for name in own}, folder / file)
        places |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder, [place.rule(name, name, shape) for name in names], PER_FILE * value.nbytes


class Watermark:
    """The most memory beyond the start that is resident when a tensor has been made."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._start = self._process.memory_info().rss
        self.peak_bytes = 0

    def __call__(self, rule: Rule) -> None:
        self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss - self._start)


def test_no_more_than_about_a_file_is_held_in_memory(
    large: tuple[Path, list[Rule], int], tmp_path: Path
) -> None:
    folder, rules, file_bytes = large
    there = Watermark()
    convert_to_megatron(rules, logical_tensors(folder), tmp_path / "ours", on_tensor=there)
    assert there.peak_bytes < 4 * file_bytes
    here = Watermark()
    to_huggingface(
        rules, tmp_path / "ours", tmp_path / "again", config={}, max_shard_bytes=file_bytes, on_tensor=here
    )
    assert here.peak_bytes < 4 * file_bytes
    assert len(list((tmp_path / "again").glob("*.safetensors"))) == NUM_FILES


def test_a_copy_that_is_none_is_named(tmp_path: Path) -> None:
    recipe = toy_of("deepseek_v3")
    tensors = write_toy(tmp_path / "first", "deepseek_v3")
    tensors["model.layers.3.shared_head.head.weight"][0, 0] += 1
    write_folder(tmp_path / "theirs", tensors, family_of(recipe.model).config(recipe.model))
    with pytest.raises(BadInputError, match=r"model\.layers\.3\.shared_head\.head\.weight: differs"):
        to_megatron(tmp_path / "theirs", tmp_path / "ours", "deepseek_v3")
    assert not (tmp_path / "ours").exists()


def test_tensors_of_one_key_in_several_types_are_named(tmp_path: Path) -> None:
    recipe = toy_of("mixtral_8x7b")
    tensors = write_toy(tmp_path / "first", "mixtral_8x7b")
    odd = "model.layers.1.block_sparse_moe.experts.5.w2.weight"
    tensors[odd] = tensors[odd].float()
    write_folder(tmp_path / "theirs", tensors, family_of(recipe.model).config(recipe.model))
    with pytest.raises(BadInputError, match=r"experts\.5\.w2\.weight: F32"):
        to_megatron(tmp_path / "theirs", tmp_path / "ours", "mixtral_8x7b")


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    write_toy(tmp_path / "theirs", "mixtral_8x7b")
    (tmp_path / "ours").mkdir()
    with pytest.raises(BadInputError, match="is there already"):
        to_megatron(tmp_path / "theirs", tmp_path / "ours", "mixtral_8x7b")


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Have the system refuse what a file takes beyond that, in the middle of a write as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("num_bytes", [100, 1_000, 30_000, 100_000])
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, num_bytes: int) -> None:
    write_toy(tmp_path / "theirs", "mixtral_8x7b")
    to_megatron(tmp_path / "theirs", tmp_path / "whole", "mixtral_8x7b")
    with files_of_at_most(num_bytes):
        with pytest.raises(MissingRequirementError, match="File too large") as caught:
            to_megatron(tmp_path / "theirs", tmp_path / "ours", "mixtral_8x7b")
        assert "\n" not in str(caught.value)
        with pytest.raises(MissingRequirementError, match="File too large"):
            back(tmp_path / "whole", tmp_path / "again", "mixtral_8x7b", max_shard_bytes=1_000_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs", "whole"]


def test_a_kill_leaves_nothing_under_the_name_and_the_next_try_is_whole(
    tmp_path: Path, zygote: Zygote
) -> None:
    tensors = write_toy(tmp_path / "theirs", "mixtral_8x7b")
    with pytest.raises(MeasurementError, match="signal 9"):
        zygote.fork(1, partial(killed_in_the_middle, "mixtral_8x7b", tmp_path))
    assert not (tmp_path / "ours").exists()
    to_megatron(tmp_path / "theirs", tmp_path / "ours", "mixtral_8x7b")
    back(tmp_path / "ours", tmp_path / "again", "mixtral_8x7b")
    assert same_bits(read_folder(tmp_path / "again"), tensors)


def test_a_distributed_checkpoint_that_is_damaged_is_told_by_a_tensor(tmp_path: Path) -> None:
    write_toy(tmp_path / "theirs", "mixtral_8x7b")
    to_megatron(tmp_path / "theirs", tmp_path / "ours", "mixtral_8x7b")
    file = max((tmp_path / "ours").glob("*.distcp"), key=lambda path: path.stat().st_size)
    whole = file.read_bytes()
    damaged = whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :]
    for content in (damaged, whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(BadInputError, match=r"not what was saved \(SHA-256\); decoder\.layers\.\d"):
            back(tmp_path / "ours", tmp_path / "again", "mixtral_8x7b")
    file.unlink()
    with pytest.raises(BadInputError, match="cannot be read"):
        back(tmp_path / "ours", tmp_path / "again", "mixtral_8x7b")
    # where nobody wrote hashes, reading itself finds what is cut off
    (tmp_path / "ours" / "integrity.json").unlink()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInputError, match=r"layers\.\d.*: cannot be read"):
        back(tmp_path / "ours", tmp_path / "again", "mixtral_8x7b")
    metadata = tmp_path / "ours" / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:-100])
    with pytest.raises(BadInputError, match=r"ours: its \.metadata cannot be read"):
        back(tmp_path / "ours", tmp_path / "again", "mixtral_8x7b")
    assert not (tmp_path / "again").exists()


def test_a_distributed_checkpoint_of_another_model_is_told_by_a_tensor(tmp_path: Path) -> None:
    write_toy(tmp_path / "theirs", "mixtral_8x7b")
    to_megatron(tmp_path / "theirs", tmp_path / "ours", "mixtral_8x7b")
    with pytest.raises(BadInputError, match=r"q_layernorm\.weight: the model has this tensor"):
        back(tmp_path / "ours", tmp_path / "again", "qwen3_30b_a3b")
    with pytest.raises(BadInputError, match=r"no metadata\.json"):
        back(tmp_path / "theirs", tmp_path / "again", "mixtral_8x7b")
