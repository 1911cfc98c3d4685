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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of a file, which share what they build, on one worker, and those of Slurm on one."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    root = Path(__file__).parent.parent
    groups = {item: _group(item.path.relative_to(root).as_posix()) for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: groups[item] != SLURM)


def _group(path: str) -> str:
    return SLURM if path.startswith(f"{SLURM}/") else path
