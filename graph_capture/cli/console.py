"""What several commands print in the same way."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text


def show_error(console: Console, error: Exception) -> None:
    """Print an error's kind and message."""
    console.print(Text.assemble((type(error).__name__, "red"), f": {error}"), soft_wrap=True)


def show_table(table: Table, console: Console | None = None) -> None:
    """Print a table with every figure in it: as wide as it wants to be where no terminal sets a width, and never
    narrower than its numbers (columns to the right) and its longest words need."""
    console = console or Console()
    if console.quiet:
        return
    for column in table.columns:
        column.overflow = "fold"
        column.no_wrap = column.no_wrap or column.justify == "right"
    before = console.width
    wide = console.options.update(width=100_000)
    size = Measurement.get(console, wide, table)
    redirected = not console.is_terminal and "COLUMNS" not in os.environ
    try:
        console.width = max(size.maximum if redirected else before, size.minimum)
        console.print(table, crop=False)
    finally:
        console.width = before


def quiet_downloads() -> None:
    """Leave out the progress bars of downloads and loading where nobody watches them. To be called before the libraries
    that draw them are imported."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
