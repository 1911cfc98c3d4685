"""Verbs that measure nothing start in a moment: no heavy package is loaded for them."""

import subprocess
import sys
from pathlib import Path

from moe_bench.results.store import write_record
from tests.results.records import record

RUN = """
import sys
from moe_bench.cli import main
_, heavy, *commands = sys.argv
for command in commands:
    if main(command.split()):
        sys.exit(f"{command}: failed")
    if found := set(heavy.split(",")) & set(sys.modules):
        sys.exit(f"{command}: loads {found}")
"""
FOR_NUMBERS = ("torch", "megatron", "pandas", "scipy", "jinja2")


def require_light(*commands: str, without: tuple[str, ...]) -> None:
    """Run `commands` one after the other in a process of their own, which ends where one loads `without`."""
    words = [sys.executable, "-c", RUN, ",".join(without), *commands]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_verbs_about_recipes_and_records_load_no_numpy(tmp_path: Path) -> None:
    write_record(tmp_path, record())
    recipes = ("list", "show deepseek_v3", "check --all", "submit deepseek_v3 --dry-run")
    records = (f"results --results {tmp_path}", f"jobs --results {tmp_path}")
    require_light(*recipes, *records, without=(*FOR_NUMBERS, "numpy", "moe_bench.cli.train"))


def test_verbs_that_predict_load_no_torch() -> None:
    plans = ("layer deepseek_v3 --plan", "h100 --plan", "calibrate --plan")
    require_light("audit deepseek_v3", "project deepseek_v3", *plans, without=FOR_NUMBERS)


def test_the_command_line_starts_without_rules_and_toys() -> None:
    require_light("--version", without=("moe_bench.spec.scale", "moe_bench.spec.legality"))
