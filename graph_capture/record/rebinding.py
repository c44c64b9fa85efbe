"""What the recorded code assigns to names outside its arguments, where a replay can do the same.

Two things a replay can do: assign what the code assigns and never reads (``self.last = h``), and count on
(``self.calls += 1``, with nothing else that looks at the number). What reads a name is seen in the bytecode of all
functions that ran; where some of it finds attributes by name at run time, nothing is concluded.
"""

from __future__ import annotations

import dis
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from graph_capture.record.entries import MISSING, Entry, Table

_DYNAMIC = {
    "getattr",
    "hasattr",
    "vars",
    "__dict__",
    "attrgetter",
    "globals",
    "locals",
    "eval",
    "exec",
    "__getattribute__",
}
_LOADS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL", "LOAD_NAME", "DELETE_ATTR", "DELETE_GLOBAL", "IMPORT_FROM")
_NOISE = ("CACHE", "PRECALL", "PUSH_NULL", "EXTENDED_ARG", "SWAP", "ROT_TWO", "NOP")


@dataclass(frozen=True)
class Rebinding:
    """A name that each replay assigns.

    Attributes:
        table: the dict of attributes or globals.
        name: the name in it.
        path: what it is called.
        by: what is added to the number under it; None where it becomes another value.
    """

    table: dict[str, Any]
    name: str
    path: str
    by: int | None

    def assign(self, value: Any = None) -> None:
        """Do what the code did."""
        self.table[self.name] = value if self.by is None else self.table[self.name] + self.by


def rebindings(entries: Sequence[Entry], codes: Sequence[types.CodeType]) -> tuple[list[Rebinding], list[Any]]:
    """What the run assigned that a replay can assign too, and the values that it assigned (None for a count).

    Args:
        entries: what was seen before, as far as it changed.
        codes: the code that ran.
    """
    changed = [(entry, *found) for entry in entries if isinstance(entry, Table) for found in entry.changes()]
    if not changed or any(not _DYNAMIC.isdisjoint(code.co_names) for code in codes):
        return [], []
    uses = {name: list(_uses(name, codes)) for _, name, _, _ in changed if isinstance(name, str)}
    made: list[Rebinding] = []
    values: list[Any] = []
    for entry, name, before, now in changed:
        found = uses.get(name, ["read"])
        if not found or now is MISSING or "read" in found:
            continue
        counts = type(before) is int and type(now) is int and "counted" in found
        if "counted" in found and (not counts or "assigned" in found):
            continue
        made.append(Rebinding(entry.table, name, entry.named(name), now - before if counts else None))
        values.append(None if counts else now)
    return made, values


def _uses(name: str, codes: Sequence[types.CodeType]) -> Iterator[str]:
    """How code uses a name: "read", "counted" (read only to add a constant to it) or "assigned"."""
    for code in codes:
        if name in code.co_consts:
            yield "read"
        if name not in code.co_names:
            continue
        instructions = [i for i in dis.get_instructions(code) if i.opname not in _NOISE]
        counting = set()
        for index, instruction in enumerate(instructions):
            if instruction.argval != name:
                continue
            if instruction.opname in _LOADS:
                adds, store = instructions[index + 1 : index + 3], instructions[index + 3 : index + 4]
                counts = (
                    len(adds) == 2
                    and adds[0].opname in ("LOAD_CONST", "LOAD_SMALL_INT")
                    and type(adds[0].argval) is int
                    and adds[1].argrepr in ("+=", "-=")
                    and bool(store)
                    and store[0].opname in ("STORE_ATTR", "STORE_GLOBAL")
                    and store[0].argval == name
                )
                counting.add(index + 3)
                yield "counted" if counts else "read"
            elif instruction.opname in ("STORE_ATTR", "STORE_GLOBAL", "STORE_NAME"):
                if index not in counting:
                    yield "assigned"
            else:
                yield "read"
