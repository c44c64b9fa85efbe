"""Measured times, kept for processes to come: an SQLite file in the cache folder.

Many processes may use it at once (WAL). A file that is damaged is moved aside and made anew; one that is locked, or
cannot be written, is worth one warning and otherwise does without.
"""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from graph_capture.cache import cache_folder, warn_once
from graph_capture.runtime.decide.measure import is_doubtful, spread_of

FILE = "decisions-3.sqlite"  # the number is that of the table's form
ATTEMPTS = 4  # to measure something on a machine that is always busy
_WAIT = 1.0  # seconds that another process may keep the file locked
_T = TypeVar("_T")


class Times(NamedTuple):
    """What was measured of a region.

    Attributes:
        fallback, fused: seconds a call.
        interpreted: whether the kernel ran in an interpreter.
        choice: which of its `candidates` was the fastest.
        spread: how many times longer than the shortest sample of a side the next one was.
        doubts: how often it was measured on a machine too busy to tell; 0 once it was not.
    """

    fallback: float
    fused: float
    interpreted: bool = False
    choice: int = 0
    spread: float = 1.0
    doubts: int = 0

    @classmethod
    def of(cls, fallback: float, fused: float, interpreted: bool = False, choice: int = 0) -> Times:
        """What `compare` has just found."""
        timings = (fallback, fused)
        doubts = int(not interpreted and is_doubtful(timings))
        return cls(float(fallback), float(fused), interpreted, choice, spread_of(timings), doubts)

    def after(self, earlier: Times | None) -> Times:
        """These times, with what an `earlier` measurement in doubt says too: the least of each side."""
        if earlier is None or not self.doubts:
            return self
        better = self if self.fused <= earlier.fused else earlier
        return self._replace(
            fallback=min(self.fallback, earlier.fallback),
            fused=better.fused,
            choice=better.choice,
            doubts=earlier.doubts + 1,
        )

    @property
    def stands(self) -> bool:
        """Whether they are not to be measured again: they are beyond doubt, or were measured often enough."""
        return not 0 < self.doubts < ATTEMPTS


class DecisionStore:
    """Key -> `Times`.

    A connection lasts for one question: threads share nothing, and a forked child inherits nothing.

    Args:
        folder: the cache folder; see `cache_folder`.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.path = cache_folder(folder) / FILE

    def get(self, key: str) -> Times | None:
        """The times under `key`; None where there are none."""

        def ask(connection: sqlite3.Connection) -> Times | None:
            query = (
                "SELECT t_fallback, t_fused, interpreted, choice, IFNULL(spread, 1.0), IFNULL(doubts, 0)"
                " FROM decisions LEFT JOIN doubts USING (key) WHERE key = ?"
            )
            return _times(connection.execute(query, (key,)).fetchone())

        return self._with(ask) if self.path.exists() else None

    def put(self, key: str, times: Times) -> None:
        """Keep the times under `key`."""
        row = (key, *times[:4], time.time())

        def tell(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT OR REPLACE INTO decisions VALUES (?, ?, ?, ?, ?, ?)", row)
            connection.execute("INSERT OR REPLACE INTO doubts VALUES (?, ?, ?)", (key, times.spread, times.doubts))

        self._with(tell)

    def __len__(self) -> int:
        return (self._with(_count) or 0) if self.path.exists() else 0

    def _with(self, act: Callable[[sqlite3.Connection], _T]) -> _T | None:
        try:
            return self._attempt(act)
        except sqlite3.OperationalError as error:  # locked, read-only, no space
            self._warn(error)
        except sqlite3.DatabaseError as error:
            self._warn(error)
            with contextlib.suppress(sqlite3.Error, OSError):
                self._replace()
                return self._attempt(act)
        except OSError as error:
            self._warn(error)
        return None

    def _attempt(self, act: Callable[[sqlite3.Connection], _T]) -> _T:
        with contextlib.closing(self._open()) as connection, connection:
            return act(connection)

    def _open(self) -> sqlite3.Connection:
        if self.path.exists() and not os.access(self.path.parent, os.W_OK):  # WAL would need to write next to it
            return sqlite3.connect(f"{self.path.as_uri()}?mode=ro&immutable=1", uri=True)
        connection = sqlite3.connect(self.path, timeout=_WAIT)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS decisions"
                " (key TEXT PRIMARY KEY, t_fallback REAL, t_fused REAL, interpreted INTEGER, choice INTEGER, made REAL)"
            )
            connection.execute("CREATE TABLE IF NOT EXISTS doubts (key TEXT PRIMARY KEY, spread REAL, doubts INTEGER)")
        except BaseException:
            connection.close()
            raise
        return connection

    def _replace(self) -> None:
        """Move a damaged file aside, unless another process has done so meanwhile."""
        with _locked(self.path.with_suffix(".lock")):
            try:
                self._attempt(_count)
            except sqlite3.DatabaseError:
                os.replace(self.path, self.path.with_suffix(".damaged"))
                for suffix in ("-wal", "-shm"):
                    Path(f"{self.path}{suffix}").unlink(missing_ok=True)

    def _warn(self, error: Exception) -> None:
        warn_once(str(self.path), f"{self.path}: {error}; going on without the decisions in it")


def _count(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT COUNT(*) FROM decisions").fetchone()[0])


def _times(row: object) -> Times | None:
    """A row's times, if they can be what was measured."""
    match row:
        case (float(fallback), float(fused), int(interpreted), int(choice), float(spread), int(doubts)) if (
            0 < fallback < math.inf and 0 < fused < math.inf and choice >= 0 and spread >= 1 and doubts >= 0
        ):
            return Times(fallback, fused, bool(interpreted), choice, spread, doubts)
    return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps other processes out, where the system can."""
    with open(path, "w") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
