"""Imports point down, torch and Megatron-Core stay in the harness, and light verbs stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "moe_bench"

LAYERS = (
    {"errors"},
    {"spec"},
    {"analysis"},
    {"checkpoints"},
    {"results"},
    {"harness", "projection", "launch"},
    {"report"},
    {"cli"},
    {"__main__"},
)
HARNESS_ONLY = {
    "torch", "megatron", "transformer_engine", "quack", "deep_ep", "apex", "transformers", "deepspeed",
    "megablocks", "modelopt",
}  # fmt: skip


def level_of(part: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if part in layer)


def imported_modules(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append(node.module or "")
    return found


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_there_are_modules_to_look_at() -> None:
    assert len(MODULES) > 20


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_its_own_layer_or_below(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[0] in HARNESS_ONLY:
            assert part == "harness", f"{path} imports {name}"
        if parts[0] == "moe_bench" and len(parts) > 1:
            is_same_part = parts[1] == part
            assert is_same_part or level_of(parts[1]) < level_of(part), f"{path} imports {name}"


@pytest.mark.parametrize(
    "module",
    [
        "moe_bench.harness.mcore_config",
        "moe_bench.harness.mcore_fields",
        "moe_bench.launch.submit",
        "moe_bench.results.metrics",
        "moe_bench.checkpoints.family",
        "moe_bench.spec.check",
        "moe_bench.cli",
    ],
)
def test_a_light_module_loads_neither_torch_nor_pandas(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "heavy = {'torch', 'megatron', 'pandas', 'numpy', 'scipy'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
