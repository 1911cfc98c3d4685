"""Where the recipes stand, in a checkout or in an installed wheel, and which file a name means."""

from __future__ import annotations

from pathlib import Path

from moe_bench.spec.load import Loader, UnknownNameError

SYSTEMS_FOLDER = "systems"


def data_root() -> Path:
    """The folder that holds `recipes/` and `results/`: the checkout, or the data inside the wheel."""
    package = Path(__file__).resolve().parent.parent
    checkout = package.parent
    return checkout if (checkout / "recipes" / SYSTEMS_FOLDER).is_dir() else package / "data"


def recipes_root() -> Path:
    """The folder of all recipes."""
    return data_root() / "recipes"


def recipe_paths(root: Path) -> tuple[Path, ...]:
    """Every run recipe below `root`, by name."""
    return tuple(
        sorted(
            path
            for path in root.glob("*/*.yaml")
            if path.parent.name != SYSTEMS_FOLDER and path.name != "model.yaml"
        )
    )


def find_recipe(name: str, loader: Loader) -> Path:
    """The file that `name` means: a path, `<model>/<run>`, or `<model>` for the model's default run.

    Raises UnknownNameError with the nearest names.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    direct = loader.root / f"{name}.yaml"
    if "/" in name and direct.is_file():
        return direct
    if (loader.root / name / "model.yaml").is_file():
        return loader.root / name / f"{loader.default_run(name)}.yaml"
    known = [path.parent.name for path in loader.root.glob("*/model.yaml")]
    known += [f"{path.parent.name}/{path.stem}" for path in recipe_paths(loader.root)]
    raise UnknownNameError("recipe", name, sorted(known))
