"""The documentation: every Python snippet runs, every public name and command has its place, the site builds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import graph_capture

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# A comment before a fence may hold what a page takes for granted (<!-- setup ... -->), or why its code does not run.
BLOCK = re.compile(
    r"<!-- setup\n(?P<setup>.*?)-->|(?P<skip><!-- not run: .+? -->\n)?```python\n(?P<code>.*?)^```", re.S | re.M
)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def blocks_of(page):
    """Line and code of each snippet that runs, in order."""
    text = page.read_text()
    for found in BLOCK.finditer(text):
        code = found["setup"] or ("" if found["skip"] else found["code"])
        if code:
            yield text.count("\n", 0, found.start("setup" if found["setup"] else "code")) + 1, code


WITH_CODE = [page for page in PAGES if any(blocks_of(page))]


@pytest.fixture
def as_before(monkeypatch, tmp_path):
    """Each page runs in a folder of its own, and what it registers does not stay."""
    from graph_capture.codegen.target import TARGETS
    from graph_capture.ir import ops
    from graph_capture.passes import DEFAULT

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DEFAULT, "_patterns", dict(DEFAULT._patterns))
    before = set(ops.TABLE), set(TARGETS)
    yield
    assert (set(ops.TABLE), set(TARGETS)) == before, "a page must unregister the ops and targets that it registers"


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_snippets_run(page, as_before):
    """The snippets of a page are one program."""
    namespace = {"__name__": "snippets"}
    for line, code in blocks_of(page):
        # The lines keep their numbers, so that a traceback names them.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


def test_every_page_is_in_the_navigation():
    index = (DOCS / "index.md").read_text()
    listed = {name for tree in re.findall(r"```{toctree}\n(.*?)```", index, re.S) for name in tree.split("\n")}
    for page in DOCS.rglob("*.md"):
        name = str(page.relative_to(DOCS).with_suffix(""))
        assert name == "index" or name in listed or f"{Path(name).parent}/*" in listed


def test_every_public_name_is_in_the_reference():
    reference = (DOCS / "reference" / "api.md").read_text()
    missing = [name for name in graph_capture.__all__ if not re.search(rf"graph_capture\.{name}$", reference, re.M)]
    assert not missing


def test_every_command_is_in_the_reference():
    from graph_capture.cli.main import app

    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert names == set(re.findall(r"^## `graph-capture (\w+)", (DOCS / "reference" / "commands.md").read_text(), re.M))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    prose = re.sub(r"^(```|<!-- setup).*?^(```|-->)", "", page.read_text(), flags=re.S | re.M)
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", prose):
        assert (page.parent / target).exists(), target


def test_the_site_builds(tmp_path):
    pytest.importorskip("sphinx", reason="needs graph-capture[docs]")
    pytest.importorskip("furo", reason="needs graph-capture[docs]")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(tmp_path)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "reference" / "api.html").read_text()
    assert 'id="graph_capture.capture"' in page
    for html in tmp_path.rglob("*.html"):  # nothing is fetched to show it
        assert not re.findall(
            r"<(?:script|img)[^>]+src=\"https?:|<link[^>]+rel=\"stylesheet\"[^>]+href=\"https?:", html.read_text()
        )
