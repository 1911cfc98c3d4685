"""Where recipes and models stand, in a checkout or in an installed wheel, and which file a name means."""

from __future__ import annotations

import re
from itertools import accumulate
from pathlib import Path

from moe_bench.errors import BadInputError
from moe_bench.spec.load import REFERENCE_MODELS_FOLDER, Loader, UnknownNameError
from moe_bench.spec.model import ModelSpec

SYSTEMS_FOLDER = "systems"


def data_root() -> Path:
    """The folder that holds `recipes/` and `results/`: the checkout, or the data inside the wheel."""
    package = Path(__file__).resolve().parent.parent
    checkout = package.parent
    return checkout if (checkout / "recipes" / SYSTEMS_FOLDER).is_dir() else package / "data"


def recipes_root() -> Path:
    """The folder of all recipes."""
    return data_root() / "recipes"


def is_recipe_file(path: Path) -> bool:
    """Whether a YAML file below a folder of recipes is a run, not a model or a system."""
    return path.parent.name not in (SYSTEMS_FOLDER, REFERENCE_MODELS_FOLDER) and path.name != "model.yaml"


def recipe_paths(root: Path) -> tuple[Path, ...]:
    """Every run recipe below `root`, by name."""
    return tuple(sorted(path for path in root.glob("*/*.yaml") if is_recipe_file(path)))


def recipe_model_keys(root: Path) -> tuple[str, ...]:
    """Keys of the models that have recipes."""
    return tuple(sorted(path.parent.name for path in root.glob("*/model.yaml")))


def reference_model_keys(root: Path) -> tuple[str, ...]:
    """Keys of the models that are there for accounting and projection only."""
    return tuple(sorted(path.stem for path in (root / REFERENCE_MODELS_FOLDER).glob("*.yaml")))


def find_recipe(name: str, loader: Loader) -> Path:
    """The file that `name` means: a path, `<model>/<run>`, or `<model>` for the model's default run.

    Raises UnknownNameError with the nearest names, BadInputError for a model without recipes and for a file
    of a model or a system.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if path.is_file() and not is_recipe_file(path.resolve()):
            raise BadInputError(
                f"{name}: facts of a model or a system, no recipe; name a recipe that uses them"
            )
        return path
    direct = loader.root / f"{name}.yaml"
    if name in reference_model_keys(loader.root):
        raise BadInputError(
            f"{name} is a reference model, for accounting and projection, without recipes; name one with "
            f"recipes, such as {recipe_model_keys(loader.root)[0]}, or write a recipe and give its path"
        )
    if "/" in name and direct.is_file():
        return direct
    if (loader.root / name / "model.yaml").is_file():
        return loader.root / name / f"{loader.default_run(name)}.yaml"
    known = list(recipe_model_keys(loader.root))
    known += [f"{path.parent.name}/{path.stem}" for path in recipe_paths(loader.root)]
    raise UnknownNameError("recipe", name, known)


def recipe_name(path: Path, loader: Loader) -> str:
    """What `find_recipe` finds the file by: `<model>/<run>`, or its whole path where it lies elsewhere."""
    whole = path.resolve()
    if whole.parent.parent == loader.root.resolve():
        return f"{whole.parent.name}/{whole.stem}"
    return str(whole)


def model_of_row(name: str, loader: Loader, *, num_layers: int | None = None) -> ModelSpec:
    """The model that a published row names, with recipes or without, cut to the layers that the row ran.

    Spelling does not matter: `Llama3.1-405B`, `llama3_1_405b` and `Llama 3.1 405B` are one model; so is a
    name without its size, `Grok-1`, where one model alone begins so. Brackets and `-LoRA` are left out, and
    `-proxy-16L` is its number of layers where `num_layers` is None.
    Raises UnknownNameError with the nearest models.
    """
    plain = name.partition("(")[0].strip()
    model = loader.model(_key_of_row(_VARIANT.sub("", plain), loader))
    proxy = _PROXY.search(plain)
    if num_layers is None and proxy is not None:
        num_layers = int(proxy[1])
    return model if num_layers is None else model.shortened(num_layers)


def _key_of_row(name: str, loader: Loader) -> str:
    """The key that is `name` but for its spelling, or the only one that begins with it, word by word."""
    wanted = _squeezed(name)
    keys = recipe_model_keys(loader.root) + reference_model_keys(loader.root)
    exact = [key for key in keys if _squeezed(key) == wanted]
    begun = [key for key in keys if wanted in accumulate(key.split("_"))]
    found = exact or begun
    if len(found) != 1:
        raise UnknownNameError("model", name, keys)
    return found[0]


def _squeezed(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


_PROXY = re.compile(r"[-_ ]proxy[-_ ](\d+)l$", flags=re.IGNORECASE)
_VARIANT = re.compile(r"[-_ ](proxy[-_ ]\d+l|lora)$", flags=re.IGNORECASE)
"""How a row says that it ran a part of a model, or trained a part of it."""
