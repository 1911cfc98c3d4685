"""From a YAML file to a checked recipe, or to one line per mistake with file, line, key, problem and fix."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from moe_bench.errors import BadInputError, Mistake, RecipeError
from moe_bench.spec.base import Spec
from moe_bench.spec.explain import explain
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.problem import Problem
from moe_bench.spec.recipe import Recipe
from moe_bench.spec.system import SystemSpec
from moe_bench.spec.yaml_tree import Node, dotted, parse_value, read_yaml

REFERENCE_MODELS_FOLDER = "reference_models"
"""Folder of models that have no recipes: one file each, for accounting and projection."""

MAX_NAMES_SHOWN = 10
"""Of those that are known, where none is like the one that was written."""

Rule = Callable[[Recipe], Sequence[Problem]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """Reads models, systems and recipes below one `recipes/` folder."""

    root: Path
    """The folder that holds `systems/`, `reference_models/` and one folder per model with recipes."""
    rules: tuple[Rule, ...] | None = None
    """What a recipe must satisfy beyond its schema; None for the rules of legality."""
    trees: dict[Path, Node] = field(default_factory=dict, repr=False, compare=False)
    """Model and system files read so far: many recipes share them."""

    def model(self, key: str) -> ModelSpec:
        """The model in `recipes/<key>/model.yaml` or `recipes/reference_models/<key>.yaml`."""
        tree = self._model_tree(key, beside=None)
        return validated(tree, ModelSpec)

    def default_run(self, key: str) -> str:
        """Run that the bare name of a model stands for, read without compiling the schema of models."""
        tree = self._model_tree(key, beside=None)
        named = tree.nearest(("default_run",)).value
        default = named if isinstance(named, str) else self.model(key).default_run
        if default is not None:
            return default
        fix = "write `default_run: <recipe>`, or name a recipe"
        raise RecipeError(
            (Mistake(file=tree.file, line=1, key="default_run", problem="the model names none", fix=fix),)
        )

    def system(self, key: str) -> SystemSpec:
        """The system in `recipes/systems/<key>.yaml`."""
        return validated(self._system_tree(key), SystemSpec)

    def recipe(self, path: Path, *, changes: Sequence[str] = ()) -> Recipe:
        """The recipe in `path`; `changes` are `key=value` texts that derive another recipe from it.

        Raises RecipeError with every mistake of the file, or with those that the changes bring in.
        """
        tree = read_yaml(path, shown_as=shown(path))
        recipe = self._checked(self._resolved(tree, path))
        self._require_name(recipe, path)
        if not changes:
            return recipe
        return self._checked(self._changed(tree, path, changes))

    def recipe_from_tree(self, tree: Node) -> Recipe:
        """A recipe from a whole tree, model and system included, as a record stores it."""
        return self._checked(tree)

    def _checked(self, tree: Node) -> Recipe:
        recipe = validated(tree, Recipe)
        problems = [problem for rule in self.rules_in_force() for problem in rule(recipe)]
        if problems:
            raise RecipeError(tuple(mistake_at(tree, problem) for problem in problems))
        return recipe

    def rules_in_force(self) -> tuple[Rule, ...]:
        """`rules`, or those of legality, which are loaded when they are first needed."""
        if self.rules is not None:
            return self.rules
        from moe_bench.spec.legality import legality_problems

        return (legality_problems,)

    def _resolved(self, tree: Node, path: Path) -> Node:
        """The tree in which the names of model and system are replaced by their files."""
        for key, read in (
            ("model", lambda name: self._model_tree(name, beside=path.parent)),
            ("system", self._system_tree),
        ):
            named = tree.value.get(key) if isinstance(tree.value, dict) else None
            if named is not None and isinstance(named.value, str):
                try:
                    tree = tree.with_child(key, read(named.value))
                except UnknownNameError as error:
                    raise RecipeError(
                        (
                            Mistake(
                                file=named.file,
                                line=named.line,
                                key=key,
                                problem=error.problem,
                                fix=error.fix,
                            ),
                        )
                    ) from error
        if isinstance(tree.value, dict) and "num_mtp_layers" not in tree.value:
            tree = tree.with_child("num_mtp_layers", _published_mtp_layers(tree))
        return tree

    def _changed(self, tree: Node, path: Path, changes: Sequence[str]) -> Node:
        parsed = [_parse_change(change) for change in changes]
        names = [change for change in parsed if change[0] in (("model",), ("system",))]
        for keys, leaf in names:
            tree = tree.with_value_at(keys, leaf)
        tree = self._resolved(tree, path)
        for keys, leaf in parsed:
            if (keys, leaf) not in names:
                tree = tree.with_value_at(keys, leaf)
        return tree

    def _require_name(self, recipe: Recipe, path: Path) -> None:
        fix = f"rename it to {recipe.run_name}.yaml, or change the content or `variant`"
        if path.stem != recipe.run_name:
            problem = f"the file is called {path.name}, its content is {recipe.run_name}"
            raise RecipeError((Mistake(file=shown(path), line=1, key="-", problem=problem, fix=fix),))
        # as written where that tells, for resolving asks the file system about every folder on the way
        in_folder = path.parent if path.parent.parent == self.root else path.resolve().parent
        in_catalogue = in_folder.parent == self.root or in_folder.parent == self.root.resolve()
        if in_catalogue and in_folder.name != recipe.model.key:
            problem = f"model {recipe.model.key} stands in the folder {in_folder.name}"
            fix = f"move it to {recipe.model.key}/"
            raise RecipeError((Mistake(file=shown(path), line=1, key="model", problem=problem, fix=fix),))

    def _model_tree(self, key: str, *, beside: Path | None) -> Node:
        own = (self.root / key / "model.yaml", self.root / REFERENCE_MODELS_FOLDER / f"{key}.yaml")
        places = own if beside is None else (beside / "model.yaml", *own)
        trees = {place: self._read_once(place) for place in places if place.is_file()}
        for tree in trees.values():
            if tree.nearest(("key",)).value == key:
                return tree
        for place in own:
            if place in trees:
                written = trees[place].nearest(("key",))
                problem = f"is {written.text or 'missing'}, and the file is that of {key}"
                fix = f"write `key: {key}`, or rename its folder or file"
                raise RecipeError(
                    (Mistake(file=shown(place), line=written.line, key="key", problem=problem, fix=fix),)
                )
        known = [path.parent.name for path in self.root.glob("*/model.yaml")]
        known += [path.stem for path in self.root.glob(f"{REFERENCE_MODELS_FOLDER}/*.yaml")]
        raise UnknownNameError("model", key, sorted(known))

    def _system_tree(self, key: str) -> Node:
        path = self.root / "systems" / f"{key}.yaml"
        if not path.is_file():
            raise UnknownNameError(
                "system", key, sorted(path.stem for path in self.root.glob("systems/*.yaml"))
            )
        return self._read_once(path)

    def _read_once(self, path: Path) -> Node:
        if path not in self.trees:
            self.trees[path] = read_yaml(path, shown_as=shown(path))
        return self.trees[path]


class UnknownNameError(BadInputError):
    """A name that stands for nothing here; the message offers the nearest ones."""

    def __init__(self, what: str, name: str, known: Sequence[str]) -> None:
        self.problem = f"there is no {what} {name!r}"
        self.fix = _nearest_or_all(name, known)
        super().__init__(f"{self.problem}; {self.fix}")


def _nearest_or_all(name: str, known: Sequence[str]) -> str:
    """Up to three names that are like `name`, those first that it begins; else what there is."""
    begun = sorted((each for each in known if each.startswith(name)), key=len)
    near = [*begun[:3], *difflib.get_close_matches(name, known, n=3, cutoff=0.5)]
    if near:
        return f"did you mean {' or '.join(repr(each) for each in list(dict.fromkeys(near))[:3])}?"
    if not known:
        return "none is known here"
    more = f" and {len(known) - MAX_NAMES_SHOWN} more" if len(known) > MAX_NAMES_SHOWN else ""
    return f"known here: {', '.join(known[:MAX_NAMES_SHOWN])}{more}"


def validated[AnySpec: Spec](tree: Node, kind: type[AnySpec]) -> AnySpec:
    """`tree` as a `kind`, or RecipeError with one line per mistake."""
    try:
        return kind.model_validate_json(json.dumps(tree.plain()))
    except ValidationError as error:
        problems = explain(tree, kind, error.errors())
        raise RecipeError(tuple(mistake_at(tree, problem) for problem in problems)) from error


def shown(path: Path) -> str:
    """`path` as the user would type it: relative where it lies below the working directory."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_absolute() and path.is_relative_to(here) else str(path)


def _published_mtp_layers(tree: Node) -> Node:
    """A recipe that is silent about multi-token prediction trains what the model has."""
    published = tree.nearest(("model", "num_mtp_layers"))
    return published if isinstance(published.value, int) else Node(0, tree.file, tree.line, "0")


def _parse_change(change: str) -> tuple[tuple[str, ...], Node]:
    key, equals, value = change.partition("=")
    if not equals or not key:
        raise BadInputError(f"--set {change}: expected key=value, such as parallel.expert=8")
    return tuple(key.split(".")), parse_value(value, shown_as=f"--set {change}")


def mistake_at(tree: Node, problem: Problem) -> Mistake:
    """`problem` with file and line of its key in `tree`, or of the nearest one above."""
    place = tree.nearest(problem.path)
    return Mistake(
        file=place.file, line=place.line, key=dotted(problem.path), problem=problem.problem, fix=problem.fix
    )
