#!/usr/bin/env python3
"""Checks that this environment holds every version of pins.yaml, by importing it.

The last step of the image build, and a quick answer on any machine to "what is missing here?":

    python containers/verify.py [--pins FILE]

Exits 0, or 3 with one line per pin that is missing or differs.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import yaml

EXIT_MISSING_REQUIREMENT = 3
"""moe_bench's exit code for "something needed is not here"; a bare machine has no moe_bench to ask."""

PINS = Path(__file__).with_name("pins.yaml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """One entry of pins.yaml."""

    name: str
    """Distribution name for pip, package name for apt."""
    kind: Literal["image", "base", "apt", "pypi", "git"]
    version: str
    """Release, image tag or full commit."""
    source: str
    why: str
    build_arg: str | None = None
    modules: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    """Names that the first module must export."""


def read_pins(path: Path) -> tuple[Pin, ...]:
    """The entries of a pins file, in its order. Raises TypeError on an unknown or missing key."""
    entries: list[dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return tuple(_pin(entry) for entry in entries)


def _pin(entry: dict[str, Any]) -> Pin:
    lists = {key: tuple(entry.get(key, ())) for key in ("modules", "attributes")}
    return Pin(**{**entry, **lists})


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_commit(distribution: str) -> str | None:
    """Commit that pip installed a distribution from (PEP 610's direct_url.json), or None."""
    try:
        record = importlib.metadata.distribution(distribution).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    commit = json.loads(record).get("vcs_info", {}).get("commit_id") if record else None
    return commit if isinstance(commit, str) else None


def installed_apt_version(package: str) -> str | None:
    """Version of an installed Debian package, or None, also where there is no dpkg."""
    command = ["dpkg-query", "--show", "--showformat=${Version}", package]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return shown.stdout or None


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What the checks ask of a machine; tests answer in its place."""

    import_module: Callable[[str], ModuleType] = importlib.import_module
    read_version: Callable[[str], str | None] = installed_version
    read_commit: Callable[[str], str | None] = installed_commit
    read_apt_version: Callable[[str], str | None] = installed_apt_version


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What became of one pin."""

    pin: Pin
    problem: str | None

    def __str__(self) -> str:
        if self.problem is None:
            return f"ok     {self.pin.name} {self.pin.version}"
        return f"WRONG  {self.pin.name}: {self.problem}; pinned {self.pin.version} from {self.pin.source}"


def version_problem(pin: Pin, environment: Environment) -> str | None:
    """What is wrong with the installed version of a pin, or None."""
    match pin.kind:
        case "apt":
            found = environment.read_apt_version(pin.name)
        case "git":
            found = environment.read_commit(pin.name)
            if found is None and (release := environment.read_version(pin.name)) is not None:
                return f"found {release}, which pip did not install from a commit"
        case _:
            found = environment.read_version(pin.name)
    if found is None:
        return "not installed"
    # NVIDIA's build numbers its package otherwise than its module; import_problem compares the module.
    return None if found == pin.version or pin.kind == "base" else f"found {found}"


def import_problem(pin: Pin, environment: Environment) -> str | None:
    """The first module or exported name of a pin that cannot be had, or None."""
    modules = []
    for name in pin.modules:
        try:
            modules.append(environment.import_module(name))
        except (ImportError, OSError) as error:  # OSError: a shared library that does not load
            return f"import {name} failed: {error}"
    missing = [name for name in pin.attributes if not hasattr(modules[0], name)]
    if missing:
        return f"{pin.modules[0]} has no {', '.join(missing)}"
    if pin.kind == "base" and modules[0].__version__ != pin.version:
        return f"found {modules[0].__version__}"
    return None


def verify(pins: Sequence[Pin], environment: Environment) -> tuple[Finding, ...]:
    """One finding per pin; a wrong version is reported before the import that it breaks.

    The image itself is left out: a container cannot tell its own tag, but its torch can.
    """
    return tuple(
        Finding(pin=pin, problem=version_problem(pin, environment) or import_problem(pin, environment))
        for pin in pins
        if pin.kind != "image"
    )


def main(arguments: Sequence[str]) -> int:
    """Print one line per pin and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="verify.py", description="Compares this environment with pins.yaml."
    )
    parser.add_argument(
        "--pins", type=Path, default=PINS, metavar="FILE", help="default: the file beside this"
    )
    findings = verify(read_pins(parser.parse_args(arguments).pins), Environment())
    for finding in findings:
        print(finding)
    num_wrong = sum(finding.problem is not None for finding in findings)
    print(f"{len(findings) - num_wrong} of {len(findings)} pins are right")
    return EXIT_MISSING_REQUIREMENT if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
