"""Folders of safetensors: what is cut off, missing, foreign or quantised, by the name of a tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_bench.checkpoints.rule import Place
from moe_bench.checkpoints.safetensors_folder import logical_tensors, read_config, require_match
from moe_bench.errors import BadInputError

TOP = Place(megatron="", huggingface="")
RULES = [TOP.rule("m.a", "a", (2, 2), copies=("a_again",)), TOP.rule("m.b", "b", (4,))]
Entry = tuple[str, list[int], int]
"""Type, shape and bytes of a tensor."""


def write(path: Path, **tensors: Entry) -> None:
    header, end = {}, 0
    for name, (dtype, shape, num_bytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + num_bytes]}
        end += num_bytes
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


def index(folder: Path, places: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files: `a` in the first, `b` in the second."""
    write(tmp_path / "1.safetensors", a=("BF16", [2, 2], 8))
    write(tmp_path / "2.safetensors", b=("F32", [4], 16))
    index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    return tmp_path


def test_headers_say_what_is_in_a_folder(folder: Path) -> None:
    found = logical_tensors(folder)
    assert [(name, tensor.dtype, tensor.shape) for name, tensor in found.items()] == [
        ("a", "BF16", (2, 2)),
        ("b", "F32", (4,)),
    ]
    require_match(found, RULES, folder=folder)


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    write(
        tmp_path / "model.safetensors", a=("BF16", [2, 2], 8), b=("F32", [4], 16), a_again=("BF16", [2, 2], 8)
    )
    require_match(logical_tensors(tmp_path), RULES, folder=tmp_path)


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:-num_bytes])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: cut(f / "2.safetensors", 1), r"2\.safetensors: b: cut off, it ends at byte \d+ of \d+"),
        (lambda f: cut(f / "2.safetensors", 30), r"2\.safetensors: cut off within its header"),
        (lambda f: (f / "2.safetensors").write_bytes(b""), r"2\.safetensors: cut off within its header"),
        (lambda f: (f / "2.safetensors").unlink(), r"2\.safetensors: missing, b is in it"),
        (
            lambda f: index(f, {"a": "1.safetensors", "b": "1.safetensors"}),
            r"1\.safetensors: b is not in it",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text("{"),
            r"model\.safetensors\.index\.json: not JSON",
        ),
        (lambda f: (f / "model.safetensors.index.json").unlink(), r"neither model\.safetensors nor"),
    ],
)
def test_damage_is_told_by_file_and_tensor(
    damage: Callable[[Path], object], message: str, folder: Path
) -> None:
    damage(folder)
    with pytest.raises(BadInputError, match=message):
        logical_tensors(folder)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"c": ("F32", [4], 16)}, "b: the model has this tensor and the checkpoint does not"),
        ({"b": ("F32", [5], 20)}, r"b: shape \[5\], but the model says \[4\]"),
        (
            {"b": ("F32", [4], 16), "c": ("F32", [1], 4)},
            "c: the checkpoint has this tensor and the model does",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_told_by_a_tensor(
    second: dict[str, Entry], message: str, folder: Path
) -> None:
    write(folder / "2.safetensors", **second)
    index(folder, {"a": "1.safetensors", **dict.fromkeys(second, "2.safetensors")})
    with pytest.raises(BadInputError, match=message):
        require_match(logical_tensors(folder), RULES, folder=folder)


def test_quantised_tensors_stand_for_plain_ones(tmp_path: Path) -> None:
    write(
        tmp_path / "model.safetensors",
        **{
            "w": ("F8_E4M3", [256, 128], 256 * 128),
            "w_scale_inv": ("F32", [2, 1], 8),
            "e_blocks": ("U8", [2, 6, 3, 16], 576),
            "e_scales": ("U8", [2, 6, 3], 36),
            "model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", [4], 16),
        },
    )
    found = logical_tensors(tmp_path)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} == {
        "w": ("BF16", (256, 128)),
        "e": ("BF16", (2, 96, 6)),
    }
    assert [stored.name for stored in found["e"].stored] == ["e_blocks", "e_scales"]


def test_a_quantised_tensor_without_its_scales_is_named(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", w=("F8_E4M3", [1, 1], 1))
    with pytest.raises(BadInputError, match="w: quantised, and w_scale_inv is not there"):
        logical_tensors(tmp_path)


def test_a_folder_without_a_config_is_no_checkpoint(folder: Path) -> None:
    with pytest.raises(BadInputError, match=r"config\.json: No such file"):
        read_config(folder)
