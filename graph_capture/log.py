"""The package's logger, and ``GRAPH_CAPTURE_LOG``."""

from __future__ import annotations

import logging
import os

log = logging.getLogger("graph_capture")
VARIABLE = "GRAPH_CAPTURE_LOG"


def configure(level: str | None = None) -> None:
    """Print the package's log to stderr from `level` on (default: what ``GRAPH_CAPTURE_LOG`` says; unset: as logging
    is configured). A name that logging does not know is reported and has no effect.
    """
    name = (os.environ.get(VARIABLE, "") if level is None else level).strip().upper()
    if not name:
        return
    if name not in logging.getLevelNamesMapping():
        log.warning("%s=%s is not a level; use DEBUG, INFO, WARNING or ERROR", VARIABLE, name)
        return
    log.setLevel(name)
    if not any(isinstance(handler, _Handler) for handler in log.handlers):
        handler = _Handler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        log.addHandler(handler)


class _Handler(logging.StreamHandler):
    """Ours, so that it is added once."""
