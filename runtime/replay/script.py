"""The text of a plan: variables and what they are bound to beforehand, lines, and kernels in a row."""

from __future__ import annotations

import builtins
import keyword
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from graph_capture.codegen.launches import BoundKernel, Chain, Operand, Prepares
from graph_capture.ir.binding import flatten_outputs
from graph_capture.ir.values import Arg, arg_indices

LONGEST = 80  # letters of a name


class Ref(str):
    """A variable of the plan."""


class Scope(NamedTuple):
    """What lines of a plan belong to: a step, in words, and the region that it is a part of, or ""."""

    step: int = -1
    doing: str = ""
    label: str = ""

    @property
    def name(self) -> str:
        """What a profiler shows."""
        return self.label or self.doing


@dataclass(frozen=True)
class Kernel:
    """A kernel that the plan calls: whose it is, its operands, and the two together where these never change."""

    place: Scope
    kernel: Prepares
    inputs: tuple[Ref, ...]
    outputs: tuple[Ref, ...]
    static: BoundKernel | None


class Script:
    """One function, line by line; what exists beforehand are its globals.

    Attributes:
        namespace: the globals.
        place: what the next lines belong to.
        places: what computes each line of the latest `text`, in words.
        scopes: what each ``with`` of the latest `text` with `traced` belongs to.
        arguments, results: of the function.
    """

    def __init__(self) -> None:
        self.namespace: dict[str, Any] = {"flat": flatten_outputs, "region": torch.profiler.record_function}
        self.place = Scope()
        self.places: list[str] = []
        self.scopes: list[Scope] = []
        self.arguments: list[Ref] = []
        self.results: list[str] = []
        self._names = {"flat", "region", "replay"}
        self._lines: list[tuple[Scope, str] | list[Kernel]] = []  # a line, or kernels in a row
        self._pending: list[Kernel] = []  # that the next kernel joins
        self._dead: list[Ref] = []
        self._functions: dict[int, Ref] = {}

    def text(self, traced: bool) -> str:
        """The function as Python; with `traced`, each region, and each other step, under its name for a profiler."""
        self.flush()
        lines, self.places = [f"def replay({', '.join(self.arguments)}):"], [""]
        self.scopes = []
        scope: str | int | None = None
        for entry in self._lines:
            if isinstance(entry, tuple):
                found = [entry]
            elif traced:
                found = [(kernel.place, self._chained([kernel])) for kernel in entry]
            else:
                found = [(Scope(), self._chained(entry))]
            for place, line in found:
                if traced and place.step >= 0 and scope != (place.label or place.step):
                    lines.append(f"    with region({place.name!r}):")
                    self.places.append("")
                    self.scopes.append(place)
                    scope = place.label or place.step
                lines.append(("    " if scope is None else "        ") + line)
                self.places.append(place.doing)
        return "\n".join([*lines, f"    return [{', '.join(self.results)}]\n"])

    def compiled(self, source: str) -> Callable[..., list[torch.Tensor]]:
        """The function of this source."""
        exec(compile(source, "<plan>", "exec"), self.namespace)
        return self.namespace.pop("replay")

    # --- lines

    def line(self, text: str) -> None:
        """A line that comes after all before it."""
        self.flush()
        self._lines.append((self.place, text))

    def aside(self, text: str) -> None:
        """A line that computes nothing, and may come before kernels that are pending."""
        self._lines.append((self.place._replace(step=-1), text))

    def launch(self, kernel: Prepares, inputs: Sequence[Ref], outputs: Sequence[Ref]) -> None:
        """A call of a kernel.

        Raises:
            FusionError: all of its operands exist, and do not fit it.
        """
        static = None
        if self.exists(*inputs, *outputs):
            static = BoundKernel(
                kernel, [self.namespace[name] for name in inputs], [self.namespace[name] for name in outputs]
            )
        self._pending.append(Kernel(self.place, kernel, tuple(inputs), tuple(outputs), static))

    def drop(self, names: Sequence[Ref] = ()) -> None:
        """Delete variables that nothing needs any more; not before the kernels that read them have run."""
        self._dead += names
        if self._dead and not self._pending:
            self.aside(f"del {', '.join(self._dead)}")
            self._dead.clear()

    def flush(self) -> None:
        """End a row of kernels."""
        if self._pending:
            self._lines.append(self._pending)
            self._pending = []
            self.drop()

    def _chained(self, kernels: Sequence[Kernel]) -> str:
        """The call of kernels in a row."""
        refs = (ref for kernel in kernels if kernel.static is None for ref in (*kernel.inputs, *kernel.outputs))
        dynamic = {ref: number for number, ref in enumerate(dict.fromkeys(r for r in refs if r not in self.namespace))}

        def operands(refs: Sequence[Ref]) -> list[Operand]:
            return [dynamic[ref] if ref in dynamic else self.namespace[ref] for ref in refs]

        bound = [k.static or BoundKernel(k.kernel, operands(k.inputs), operands(k.outputs)) for k in kernels]
        return f"{self.static('kernels', Chain(bound))}({', '.join(dynamic)})"

    # --- variables

    def exists(self, *names: Ref) -> bool:
        """Whether these are the same values at each call."""
        return all(name in self.namespace for name in names)

    def name(self, wish: str) -> Ref:
        """A new variable, called like `wish` as far as ASCII goes: Python takes other letters for each other."""
        base = re.sub(r"[^A-Za-z0-9_]", "_", wish)[:LONGEST].lstrip("_") or "value"
        if base[0].isdigit() or keyword.iskeyword(base) or hasattr(builtins, base):
            base = f"v{base}"
        name, number = base, 1
        while name in self._names:
            name, number = f"{base}_{number}", number + 1
        self._names.add(name)
        return Ref(name)

    def static(self, wish: str, value: Any) -> Ref:
        """A new global."""
        name = self.name(wish)
        self.namespace[name] = value
        return name

    def function(self, function: Callable[..., Any], wish: str = "") -> Ref:
        """The global of a function."""
        if id(function) not in self._functions:
            name = getattr(function, "__name__", wish) if "<" not in getattr(function, "__name__", "<") else wish
            self._functions[id(function)] = self.static(f"op_{name}", function)
        return self._functions[id(function)]

    def written(self, value: Any, given: Sequence[Ref]) -> str:
        """An argument of a node's call as text."""
        if isinstance(value, Arg):
            return given[value.index]
        if isinstance(value, tuple) and arg_indices(value):
            return f"[{', '.join(self.written(item, given) for item in value)}]"
        return self.constant(list(value) if isinstance(value, tuple) else value)

    def operand(self, value: Any) -> str:
        """A variable, a list of them, or a constant as text."""
        if isinstance(value, Ref):
            return value
        if isinstance(value, list) and any(isinstance(item, Ref) for item in value):
            return f"[{', '.join(map(self.operand, value))}]"
        return self.constant(value)

    def constant(self, value: Any) -> str:
        """A constant as text, or the global that holds it."""
        if type(value) in (bool, int, type(None)) or (type(value) is float and math.isfinite(value)):
            return repr(value)
        if isinstance(value, (tuple, list)) and all(type(item) in (bool, int) for item in value):
            return repr(value)
        return self.static(str(value) if isinstance(value, (torch.dtype, str)) else "constant", value)
