"""Promises about the repository itself."""

import ast
import tomllib
from pathlib import Path

import pytest

import graph_capture

ROOT = Path(__file__).parent.parent
LAYERS = ("graph_capture", "passes", "codegen", "runtime")
# These stand above all layers.
COMMANDS = {"bench.py", "chat.py", "cli.py", "demo.py", "exchange.py", "inspection.py", "kernels.py", "ways.py"}
TOP = {"__init__.py"} | COMMANDS


def sources():
    return [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


def layer_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else "graph_capture"


@pytest.mark.parametrize("path", sources(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_go_one_way(path):
    if path.parent.name == "graph_capture" and path.name in TOP:
        return
    level = LAYERS.index(path.relative_to(ROOT).parts[0])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("graph_capture"):
            assert LAYERS.index(layer_of(node.module)) <= level, f"{path.name} imports {node.module}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 400


def test_the_version_is_said_once():
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert tomllib.load(file)["project"]["version"] == graph_capture.__version__


def test_public_names_exist():
    assert all(hasattr(graph_capture, name) for name in graph_capture.__all__)
