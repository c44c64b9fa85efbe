"""Promises about the repository itself."""

import ast
import tomllib
from pathlib import Path

import networkx
import pytest

import graph_capture

ROOT = Path(__file__).parent.parent
PACKAGES = ("graph_capture", "passes", "codegen", "runtime")
# What may import what: a floor imports itself and those below it. Those that share a line do not know each other.
FLOORS = (
    "errors",
    "log",
    "cache",
    "ir",
    "calls",
    "record",
    "frontends, passes, codegen",
    "runtime.config",
    "runtime.library",
    "runtime.region",
    "runtime.program",
    "runtime.replay",
    "runtime.decide",
    "runtime.account",
    "runtime.save",
    "runtime.fused",
    "runtime.fuse",
    "runtime.load",
    "runtime.capture",
    "runtime.doctor",
    "runtime.llm",
    "runtime",
    "testing",
    "the package itself",
    "tiny",
    "cli",
    "__main__",
)


def module_name(path):
    parts = [*path.relative_to(ROOT).with_suffix("").parts]
    parts = parts if parts[0] == "graph_capture" else ["graph_capture", *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for top in PACKAGES for path in sorted((ROOT / top).rglob("*.py"))}


def imports_of(module):
    """The modules that `module` imports, anywhere in it but under TYPE_CHECKING."""
    tree = ast.parse(SOURCES[module].read_text())
    checking = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    skipped = {id(inner) for node in checking for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom):
            # A relative import is of a module's neighbour: the workers load such modules by their path.
            home = ".".join([*module.split(".")[: -node.level], node.module]) if node.level else node.module
            names = [f"{home}.{alias.name}" for alias in node.names]
            names = [name if name in SOURCES else home for name in names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] == "graph_capture" and name != module)


def import_graph():
    graph = networkx.DiGraph([(module, name) for module in SOURCES for name in imports_of(module)])
    assert graph.has_edge("graph_capture.ir.binding", "graph_capture.ir.ops")
    return graph


def floor_of(module):
    """The number of a module's floor, and the part of it that the module belongs to."""
    name = module.partition(".")[2] or "the package itself"
    parts = {part: level for level, floor in enumerate(FLOORS) for part in floor.split(", ")}
    known = max((part for part in parts if f"{name}.".startswith(f"{part}.")), key=len)
    return parts[known], known


def test_imports_run_downward():
    floors = {module: floor_of(module) for module in SOURCES}
    upward = [
        f"{module} imports {name}"
        for module, name in import_graph().edges
        if floors[name] != floors[module] and floors[name][0] >= floors[module][0]
    ]
    assert not upward, "\n".join(upward)


def test_no_modules_import_each_other_in_a_circle():
    circles = [sorted(group) for group in networkx.strongly_connected_components(import_graph()) if len(group) > 1]
    assert not circles


def test_every_import_names_a_module():
    assert set(import_graph().nodes) <= set(SOURCES)


def test_no_two_classes_share_a_name():
    homes = {}
    for module, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(module)
    assert not {name: modules for name, modules in homes.items() if len(modules) > 1}


@pytest.mark.parametrize("path", SOURCES.values(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("top", PACKAGES)
def test_every_folder_says_what_it_is_for(top):
    for folder in {path.parent for path in (ROOT / top).rglob("*.py")}:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


def test_the_wheel_has_every_package():
    with (ROOT / "pyproject.toml").open("rb") as file:
        settings = tomllib.load(file)
    assert settings["project"]["version"] == graph_capture.__version__
    folders = {module for module, path in SOURCES.items() if path.name == "__init__.py"}
    assert set(settings["tool"]["setuptools"]["packages"]) == folders


def test_public_names_exist():
    assert all(hasattr(graph_capture, name) for name in graph_capture.__all__)
