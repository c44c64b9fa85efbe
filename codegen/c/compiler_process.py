"""Running the C compiler: it gets a text, has a time to answer in, and never outlives who asked."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from graph_capture.errors import FusionError

SECONDS = 120.0  # within which a compiler must be done
_running: set[subprocess.Popen[bytes]] = set()
_lock = threading.Lock()


class Answer(NamedTuple):
    """What a compiler said, and its exit status."""

    status: int
    output: str
    errors: str


def words(text: str, variable: str) -> list[str]:
    """The words of an environment variable, as a shell would take them apart.

    Raises:
        FusionError: a quotation mark has no partner.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise FusionError(
            f"{variable} is {text!r}, which cannot be taken apart: {error}; balance its quotes"
        ) from error


def run(line: Sequence[str], text: str = "", folder: Path | None = None, seconds: float | None = None) -> Answer:
    """Run a compiler on `text`, with its temporary files in `folder`.

    It is ended, and what it started as well, when the time is over or the caller is interrupted.

    Raises:
        FusionError: it cannot be run, or does not answer in time.
    """
    limit = SECONDS if seconds is None else seconds
    environment = {**os.environ, "TMPDIR": str(folder)} if folder is not None else None
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    try:
        with subprocess.Popen([*line], **pipes, env=environment, start_new_session=True) as process:
            try:
                with _lock:
                    _running.add(process)
                output, errors = process.communicate(text.encode(), timeout=limit)
            except BaseException:
                _end(process)
                raise
            finally:
                _running.discard(process)
    except subprocess.TimeoutExpired as error:
        raise FusionError(
            f"the C compiler {line[0]} did not answer within {limit:g} seconds; set CC to another"
        ) from error
    except OSError as error:
        raise FusionError(f"the C compiler {line[0]} cannot be run: {error}") from error
    return Answer(process.returncode, output.decode(errors="replace"), errors.decode(errors="replace"))


def end_all() -> None:
    """End every compiler that runs, because who asked for it was interrupted."""
    with _lock:
        for process in [*_running]:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)  # a driver's children too
