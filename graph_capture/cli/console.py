"""What several commands print in the same way."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text


def show_error(console: Console, error: Exception) -> None:
    """Print an error's kind and message."""
    console.print(Text.assemble((type(error).__name__, "red"), f": {error}"), soft_wrap=True)
