"""Reports keep every figure, whatever they are printed to."""

import io
import os
import re
import subprocess
import sys

import pytest
from rich.console import Console
from rich.table import Table

from graph_capture.cli.console import show_table

FIGURES = [str(10**position + position) for position in range(8, 20)]
SMALL = {
    "kernels": ("llama-tiny", "--prompt", "8", "--slots", "32", "--layers", "1", "--target", "sm_80"),
    "inspect": ("llama-tiny", "--prompt", "8", "--slots", "32", "--layers", "1", "--no-measure", "--device", "cpu"),
    "cache": ("info",),
    "demo": ("--layers", "1", "--hidden", "32", "--heads", "4", "--intermediate", "48", "--no-talk"),
    "bench": (
        *("--config", "llama-tiny", "--device", "cpu", "--prompt", "4", "--tokens", "2", "--rounds", "1"),
        *("--no-starts", "--no-compare"),
    ),
}


def report():
    table = Table()
    table.add_column("kernel")
    table.add_row("a_kernel_with_a_long_name " * 4, *FIGURES)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


@pytest.mark.parametrize("terminal", [True, False])
def test_figures_are_not_cut(terminal, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    console = Console(file=io.StringIO(), width=60 if terminal else None, force_terminal=terminal, color_system=None)
    before = console.width
    show_table(report(), console)
    text = console.file.getvalue()
    assert all(re.search(rf"(?<!\d){figure}(?!\d)", text) for figure in FIGURES)
    assert "…" not in text
    assert console.width == before
    lines = [line for line in text.splitlines() if "a_kernel_with_a_long_name" in line]
    assert (len(lines) == 1) == (not terminal)  # a file is as wide as the report; a terminal folds words


@pytest.mark.parametrize("command", SMALL)
def test_redirected_commands_cut_nothing(command, tmp_path):
    plain = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        arguments = [sys.executable, "-m", "graph_capture", command, *SMALL[command]]
        done = subprocess.run(arguments, stdout=out, stderr=err, env=plain, timeout=500, check=False)
    text, said = (tmp_path / "out").read_text(), (tmp_path / "err").read_text()
    assert done.returncode == 0, said
    assert text.strip()
    assert "…" not in text
    for stream in (text, said):
        assert "%|" not in stream  # a progress bar
        assert "\r" not in stream
        assert "\x1b" not in stream
