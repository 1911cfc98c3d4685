"""Small checkpoints of Hugging Face's format: random values under the names and shapes of a toy's map."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_bench.checkpoints.family import family_of
from moe_bench.checkpoints.rule import Rule
from moe_bench.checkpoints.safetensors_folder import CONFIG, INDEX
from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.derive_verify import VerifyLayout, verify_recipe
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Recipe

LOADER = Loader(root=recipes_root())


def toy_of(key: str, layout: VerifyLayout = "1 process") -> Recipe:
    asked = LOADER.recipe(find_recipe(key, LOADER))
    return verify_recipe(asked, host=LOADER.system("cpu_host"), layout=layout)


def rules_of(recipe: Recipe) -> tuple[Rule, ...]:
    model = recipe.model
    return tuple(family_of(model).rules(model, num_mtp_layers=model.num_mtp_layers))


def random_tensors(rules: Sequence[Rule]) -> dict[str, Tensor]:
    """BF16 values, FP32 for the bias that chooses experts; copies are copies."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for rule in rules:
        for named in rule.huggingface:
            value = torch.randn(named.shape, generator=generator)
            tensors[named.name] = value if "correction_bias" in named.name else value.bfloat16()
        tensors |= {copy: tensors[rule.huggingface[0].name].clone() for copy in rule.copies}
    return tensors


def write_folder(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, object], *, num_files: int = 3
) -> Path:
    """The tensors dealt out over files, so that what belongs together does not lie together."""
    folder.mkdir()
    files = [f"model-{number + 1:05d}-of-{num_files:05d}.safetensors" for number in range(num_files)]
    places = {name: files[index % num_files] for index, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensors[name] for name in tensors if places[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def write_toy(folder: Path, key: str) -> dict[str, Tensor]:
    """A checkpoint of a toy; its tensors."""
    recipe = toy_of(key)
    tensors = random_tensors(rules_of(recipe))
    write_folder(folder, tensors, family_of(recipe.model).config(recipe.model))
    return tensors


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by the safetensors library."""
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    tensors = {
        name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()
    }
    assert tensors.keys() == places.keys()
    return tensors


def same_bits(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )
