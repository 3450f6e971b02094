"""Imports run one way: tasks → models → rotary; datamodules stand alone; the heavy ones stay behind their file."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"tools", "rotary", "models", "tasks", "datamodules", "launch", "results", "compat", "bench"}
ALLOWED = {
    "rotary": {"rotary"},
    "models": {"models", "rotary", "compat"},  # compat: models.convert is also a command
    "datamodules": {"datamodules"},
    "tasks": {"tasks", "models", "rotary", "datamodules.batches", "datamodules.scene"},
}
OUTSIDE_ROTARY = {"torch", "__future__"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
    return found


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"{package}/ has no Python files"
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_run_one_way(package):
    for path in files(package):
        for name in imports(path):
            if name.split(".")[0] in OURS:
                allowed = name in ALLOWED[package] or name.split(".")[0] in ALLOWED[package]
                assert allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_the_core_needs_torch_alone():
    import sys

    for path in files("rotary"):
        outside = {name.split(".")[0] for name in imports(path)} - OUTSIDE_ROTARY - {"rotary"}
        assert outside <= set(sys.stdlib_module_names), f"{path.name} imports {outside}"


@pytest.mark.parametrize("package", ["rotary", "models", "datamodules"])
def test_configs_die_in_the_entry_scripts(package):
    for path in files(package):
        assert not {"hydra", "omegaconf"} & {name.split(".")[0] for name in imports(path)}, path.name


def test_the_checker_sees_a_wrong_arrow(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from tasks.base import Task\nimport models.vit\n")
    assert imports(wrong) == {"tasks.base", "models.vit"}
