"""What README and docs say is what the code does."""

import re
from pathlib import Path

import pytest

from moe_bench.cli import app_with
from moe_bench.errors import EXIT_CODES
from moe_bench.results.published import load_rows
from moe_bench.spec.catalogue import data_root, recipe_model_keys, recipe_paths

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = (ROOT / "docs" / "commands.md").read_text()


def test_the_numbers_of_models_recipes_and_rows_are_true() -> None:
    text = " ".join(README.split())
    paths = recipe_paths(data_root() / "recipes")
    assert set(re.findall(r"(\d+) recipes", text)) == {str(len(paths))}
    num_copies = sum("\nreproduces: " in path.read_text() for path in paths)
    assert f"{num_copies} copy a published row" in text
    num_models = len(recipe_model_keys(data_root() / "recipes"))
    assert (ROOT / "docs" / "models.md").read_text().startswith(f"# Models\n\n{num_models} models,")
    num_rows = len(load_rows(data_root() / "results" / "published"))
    assert f"of {num_rows}, with their sources" in text


def test_the_exit_codes_are_documented() -> None:
    for code, meaning in EXIT_CODES:
        assert f"| {code} | {meaning} |" in COMMANDS


def test_every_verb_is_documented_and_every_documented_verb_exists() -> None:
    app = app_with()
    shown = [command for command in app.registered_commands if not command.hidden]
    verbs = {command.name or command.callback.__name__ for command in shown}
    verbs |= {group.name for group in app.registered_groups}
    documented = set(re.findall(r"^\| `([a-z0-9]+)", COMMANDS, re.MULTILINE))
    assert documented == verbs


def test_why_a_test_needs_a_gpu_stands_in_the_list_of_what_has_no_cpu_path() -> None:
    rows = [line.split(" | ") for line in (ROOT / "docs" / "gpu.md").read_text().splitlines()]
    listed = {
        (cells[1], path) for cells in rows if len(cells) > 3 for path in re.findall("`([^`]+)`", cells[3])
    }
    marked = {
        (why, path.relative_to(ROOT / "tests" / "harness").as_posix())
        for path in (ROOT / "tests").rglob("test_*.py")
        for why in re.findall(r'@pytest\.mark\.gpu\("([^"]+)"\)', path.read_text())
    }
    assert marked
    assert marked <= listed
    assert {why for why, _ in listed} - {why for why, _ in marked} == {"the same on the device"}


def linked_files() -> list[tuple[str, str]]:
    found = []
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            found.append((str(page.relative_to(ROOT)), target))
    return found


@pytest.mark.parametrize(("page", "target"), linked_files())
def test_a_link_leads_to_a_file(page: str, target: str) -> None:
    assert ((ROOT / page).parent / target).exists()
