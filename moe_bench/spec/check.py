"""Which of many recipes are legal: every mistake of their files and every rule they break, with its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_bench.errors import BadInputError, Mistake, RecipeError
from moe_bench.spec.catalogue import find_recipe, is_recipe_file, recipe_paths
from moe_bench.spec.load import Loader, shown
from moe_bench.spec.scale import Plan
from moe_bench.spec.yaml_tree import dotted

Derive = Callable[[Path], object]
"""Reads one recipe file and derives what would run; raises BadInputError where that is impossible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What is wrong with some recipes."""

    num_recipes: int
    num_refused: int
    mistakes: tuple[Mistake, ...]

    @property
    def summary(self) -> str:
        """One line: how many were looked at, and how many are refused."""
        recipes = _counted(self.num_recipes, "recipe")
        if not self.num_refused:
            return f"{recipes}, all legal" if self.num_recipes > 1 else f"{recipes}, legal"
        return f"{_counted(len(self.mistakes), 'problem')} in {self.num_refused} of {recipes}"

    def as_json(self) -> dict[str, object]:
        """The same for machines; `mistakes` is empty where all is legal."""
        return {
            "num_recipes": self.num_recipes,
            "num_refused": self.num_refused,
            "mistakes": [
                {name: getattr(mistake, name) for name in ("file", "line", "key", "problem", "fix")}
                for mistake in self.mistakes
            ],
        }


def named_files(names: Sequence[str], loader: Loader, *, is_all: bool) -> tuple[Path, ...]:
    """The recipe files that `names` stand for: recipes, files, folders of them; or all that are shipped.

    Raises BadInputError where nothing is named, and where a folder holds no recipe.
    """
    if is_all and names:
        raise BadInputError("--all means every recipe; leave the names out")
    if not is_all and not names:
        raise BadInputError("check: which recipes? name some, a folder, or --all")
    paths = list(recipe_paths(loader.root)) if is_all else []
    for name in names:
        folder = Path(name)
        paths += _recipes_below(folder) if folder.is_dir() else [find_recipe(name, loader)]
    return tuple(dict.fromkeys(paths))


def check_recipes(paths: Sequence[Path], *, derive: Derive) -> Checked:
    """Every mistake of every file, in file order, and every rule that what would run breaks."""
    mistakes: list[Mistake] = []
    num_refused = 0
    for path in paths:
        found = _mistakes(path, derive)
        mistakes += found
        num_refused += bool(found)
    return Checked(num_recipes=len(paths), num_refused=num_refused, mistakes=tuple(mistakes))


def require_legal(plan: Plan, path: Path, loader: Loader) -> Plan:
    """`plan`, or RecipeError where the recipe that was derived from the one in `path` breaks a rule."""
    if plan.scale == "full":  # the loader has asked already
        return plan
    mistakes = tuple(
        _mistake(
            path, key=dotted(problem.path), text=f"at {plan.scale} scale {problem.problem}; {problem.fix}"
        )
        for rule in loader.rules_in_force()
        for problem in rule(plan.recipe)
    )
    if mistakes:
        raise RecipeError(mistakes)
    return plan


def _mistakes(path: Path, derive: Derive) -> tuple[Mistake, ...]:
    try:
        derive(path)
    except RecipeError as error:
        return error.mistakes
    except BadInputError as error:
        if str(error).startswith("--"):  # the command line's, in no file
            raise
        return (_mistake(path, key="-", text=str(error)),)
    return ()


def _mistake(path: Path, *, key: str, text: str) -> Mistake:
    """A problem of a derived recipe, which has no lines of its own."""
    problem, _, fix = text.rpartition("; ")
    return Mistake(file=shown(path), line=1, key=key, problem=problem or fix, fix=fix)


def _recipes_below(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*.yaml") if is_recipe_file(path))
    if not files:
        raise BadInputError(f"{folder}: no recipe in it; name a folder with recipe files")
    return files


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
