"""What all tests share: the skip of those for a GPU, and where they run with several workers."""

from __future__ import annotations

from pathlib import Path

import pytest

SLURM = "tests/slurm"
"""One cluster serves all of its files; its tests mostly wait, so they start first."""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where torch sees none, with what docs/gpu.md says that a CPU lacks."""
    mark = item.get_closest_marker("gpu")
    if mark is None:
        return
    if not mark.args:
        raise pytest.UsageError(f"{item.nodeid}: say why it needs a GPU: @pytest.mark.gpu('...')")
    import torch

    if not torch.cuda.is_available():
        pytest.skip(f"needs a GPU: {mark.args[0]}")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Keep the tests of a file, which share what they build, on one worker, and those of Slurm on one.

    xdist reads these marks before `pytest_collection_modifyitems` of a conftest is called.
    """
    if item.config.pluginmanager.hasplugin("xdist"):
        item.add_marker(pytest.mark.xdist_group(_group(item)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of Slurm first."""
    items.sort(key=lambda item: _group(item) != SLURM)


def _group(item: pytest.Item) -> str:
    path = item.path.relative_to(Path(__file__).parent.parent).as_posix()
    return SLURM if path.startswith(f"{SLURM}/") else path
