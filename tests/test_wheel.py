"""The wheel carries the recipes, the registry and the job script, and works away from the checkout."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from moe_bench.spec.catalogue import recipe_paths, recipes_root

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the content of the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    code = "import sys, hatchling.build; print(hatchling.build.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    wheel = folder / done.stdout.split()[-1]
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, "-m", "moe_bench", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_wheel_lists_every_recipe(site: Path, tmp_path: Path) -> None:
    done = run(site, tmp_path, "list", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == len(recipe_paths(recipes_root()))


def test_a_wheel_submits_its_own_job_script(site: Path, tmp_path: Path) -> None:
    done = run(site, tmp_path, "submit", "deepseek_v3", "--dry-run")
    assert done.returncode == 0, done.stderr
    script = site / "moe_bench" / "data" / "slurm" / "run_recipe.sh"
    assert str(script) in done.stdout
    assert script.is_file()


def test_a_wheel_reads_its_registry(site: Path, tmp_path: Path) -> None:
    done = run(site, tmp_path, "list", "--defaults")
    assert done.returncode == 0, done.stderr
    assert "automodel-deepseek-v3-h100-256gpu-bf16-s4096 | 1,002" in done.stdout


def test_a_wheel_writes_the_page_with_its_own_templates(site: Path, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    done = run(site, tmp_path, "report", "--html", "report.html")
    assert done.returncode == 0, done.stderr
    assert "</html>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_wheel_holds_no_tests_and_no_results(site: Path) -> None:
    names = [path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()]
    assert "moe_bench/data/recipes/deepseek_v3/model.yaml" in names
    assert not [name for name in names if name.startswith("tests/")]
    records = [name for name in names if "data/results/" in name and "data/results/published/" not in name]
    assert records == []
