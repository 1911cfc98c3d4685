"""Every command that README and docs show is one that the command line takes."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from moe_bench.cli import app_with
from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.load import Loader

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
GROUP = typer.main.get_command(app_with())
BLOCK_LINE = re.compile(r"^(?: {4})?(?:\$ )?(?:\S*/)?moe-bench (.+)$")
INLINE = re.compile(r"(?:^|.* )(?:\S*/)?moe-bench ([a-z].*)")
REST_OF_LINE = re.compile(r" +#.*| *[>|].*")
"""A comment, or where the shell sends the output."""
VERB_ROW = re.compile(r"^\| `([a-z0-9]+)[^`]*` \| (.*) \|$", re.MULTILINE)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


def nested(command: typer.core.TyperCommand) -> dict[str, typer.core.TyperCommand]:
    """The verbs of a verb, as `show` of `jobs`."""
    return getattr(command, "commands", {})


def options_of(*words: str) -> set[str]:
    """The options of the verb that `words` begin with and of the verbs of it that they go on with."""
    command = nested(GROUP)[words[0]]
    on_the_way = [command, *(nested(command)[word] for word in words[1:] if word in nested(command))]
    parameters = [parameter for one in on_the_way for parameter in one.params]
    return {name for one in parameters for name in (*one.opts, *one.secondary_opts)}


def parse(command: typer.core.TyperCommand, name: str, words: list[str]) -> typer.Context:
    """Read the words as the command line does; raises where an option, a value or an argument is off."""
    context = command.make_context(name, list(words))
    verb = next((index for index, word in enumerate(words) if word in nested(command)), None)
    return context if verb is None else parse(nested(command)[words[verb]], words[verb], words[verb + 1 :])


def block_commands(page: Path) -> list[str]:
    """What stands in a block of code, as the reader would paste it."""
    lines = page.read_text().replace("\\\n", " ").splitlines()
    return [REST_OF_LINE.sub("", match[1]) for match in map(BLOCK_LINE.match, lines) if match is not None]


def inline_commands(page: Path) -> list[str]:
    """What stands in the text: behind `moe-bench`, or a verb with options."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    named = [match[1] for match in map(INLINE.match, spans) if match is not None]
    return named + [span for span in spans if "--" in span and span.split()[0] in nested(GROUP)]


def test_the_pages_show_commands_in_blocks_and_in_the_text() -> None:
    assert "check deepseek_v3" in block_commands(ROOT / "docs" / "check.md")
    assert {"check deepseek_v3", "check --all"} <= set(inline_commands(ROOT / "README.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_command_in_a_block_can_be_pasted_and_its_recipes_are_here(page: Path) -> None:
    loader = Loader(root=recipes_root(), rules=())
    for command in block_commands(page):
        values = parse(GROUP, "moe-bench", shlex.split(command)).params
        for recipe in filter(None, [values.get("recipe"), *(values.get("recipes") or ())]):
            assert recipe == "RECIPE" or (ROOT / find_recipe(recipe, loader)).is_file(), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_command_in_the_text_has_a_verb_and_options_that_there_are(page: Path) -> None:
    for command in inline_commands(page):
        words = command.split()
        assert words[0] in nested(GROUP), command
        assert set(OPTION.findall(command)) <= options_of(*words), command


@pytest.mark.parametrize(
    ("verb", "does"),
    VERB_ROW.findall((ROOT / "docs" / "commands.md").read_text()),
    ids=lambda text: text[:12],
)
def test_a_row_of_the_table_of_verbs_names_options_of_that_verb(verb: str, does: str) -> None:
    assert set(OPTION.findall(does)) <= options_of(verb, *nested(nested(GROUP)[verb]))
