"""A `RotarySpec` as a C function: a unit of work is one token, with all its heads.

The tables' rows and each head are brought into float buffers on the stack, where columns lie next to each other
whatever the strides of the tensors are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from graph_capture.codegen.c import printing as c_print
from graph_capture.codegen.c.host import Layout, place
from graph_capture.codegen.spec.rotary import RotarySpec, Track
from graph_capture.errors import FusionError


def layout(spec: RotarySpec, tensors: Sequence[torch.Tensor], thread_work: int) -> tuple[Layout, ...]:
    """How a call on these tensors runs; a counter is added to by a launch of its own, when all tokens are done.

    Raises:
        FusionError: they do not fit the kernel.
    """
    seen = spec.seen(tensors)
    names = [operand.name for operand in (*spec.inputs, *spec.outputs)]
    batch, length = seen[spec.tracks[0].source].shape[:2]
    numbers: list[int] = [batch, length]
    operands = []
    for name in _views(spec):
        view, tensor = seen[name], tensors[names.index(_tensor(spec, name))]
        if view.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
            raise FusionError(f"{name} lies so that it would have to be copied")
        numbers += [
            *(step if size > 1 else 0 for size, step in zip(view.shape, view.stride(), strict=True)),
            view.shape[1],
        ]
        operands.append(place(names.index(_tensor(spec, name)), view, tensor))
    work = sum(track.heads * spec.width * 8 for track in spec.tracks)
    calls = [Layout(tuple(numbers), batch * length, max(1, thread_work // work), tuple(operands))]
    if spec.count:
        counter = tensors[names.index(spec.count)]
        calls.append(Layout((), 1, 1, (place(names.index(spec.count), counter, counter),), "_count"))
    return tuple(calls)


def source(spec: RotarySpec, name: str) -> str:
    """The function's text, and that of the counter's."""
    text = _RotaryPrinter(spec).function(name)
    if spec.count:
        text += (
            f"\nvoid {name}_count(void *const *operands, const int64_t *numbers, int64_t begin, int64_t end) {{\n"
            f"    *(int64_t *)operands[0] += {spec.step};\n}}\n"
        )
    return text


def _views(spec: RotarySpec) -> list[str]:
    """What the function gets: names in `RotarySpec.seen`, each once."""
    names = [track.source for track in spec.tracks]
    names += [spec.cos, spec.sin]
    names += [track.norm.weight for track in spec.tracks if track.norm is not None and track.norm.weight]
    names += [*spec.positions, *(track.target for track in spec.tracks)]
    return list(dict.fromkeys(names))


def _tensor(spec: RotarySpec, name: str) -> str:
    """The tensor behind a view; the imaginary part of a complex table goes by the name of the sines, which is empty."""
    return name or spec.cos


class _RotaryPrinter:
    def __init__(self, spec: RotarySpec) -> None:
        self.spec = spec
        self.dtypes = {operand.name: operand.dtype for operand in (*spec.inputs, *spec.outputs)}
        if not spec.sin:
            self.dtypes[spec.cos] = self.dtypes[spec.sin] = torch.float32
        wide = torch.float64 in self.dtypes.values()
        self.float = "double" if wide else "float"
        self.views = _views(spec)

    def function(self, name: str) -> str:
        """The whole of it."""
        spec = self.spec
        lines = ["const int64_t length = numbers[1];", "for (int64_t unit = begin; unit < end; unit++) {"]
        body = ["const int64_t b = unit / length, l = unit % length;"]
        halves = ("", "_far") if not spec.half_tables else ("",)
        for table, view in (("cos", spec.cos), ("sin", spec.sin)):
            for far, part in enumerate(halves):
                body.append(f"{self.float} {table}{part}[{max(1, spec.half)}];")
                start, step = self._part(far) if not spec.half_tables else ("0", "1")
                body += self._load(f"{table}{part}", view, "0", spec.half, start, step)
        if spec.positions:
            terms = [f"*({self._pointer(view, 'int64_t')})" for view in spec.positions]
            body.append(f"const int64_t position = {' + '.join(terms)};")
        for number, track in enumerate(spec.tracks):
            body += self._track(number, track)
        lines += [*(f"    {line}" for line in body), "}"]
        head = f"void {name}(void *const *operands, const int64_t *numbers, int64_t begin, int64_t end) {{"
        return "\n".join([head, *(f"    {line}" for line in lines), "}", ""])

    def _part(self, far: int) -> tuple[str, str]:
        """Where the first or the second elements of a head start, and how far they lie apart."""
        if self.spec.interleaved:
            return str(far), "2"
        return (str(self.spec.half) if far else "0"), "1"

    def _number(self, view: str, which: int) -> str:
        return f"numbers[{2 + 5 * self.views.index(view) + which}]"

    def _pointer(self, view: str, kind: str, length: str = "l", head: str = "0") -> str:
        index = self.views.index(view)
        text = f"({kind} *)operands[{index}] + b * {self._number(view, 0)} + {length} * {self._number(view, 1)}"
        return text + (f" + {head} * {self._number(view, 2)}" if head != "0" else "")

    def _load(self, buffer: str, view: str, head: str, count: int, start: str = "0", step: str = "1") -> list[str]:
        """Elements of a row into a buffer."""
        dtype = self.dtypes[view]
        kind, stride = c_print.MEMORY[dtype], self._number(view, 3)

        def loop(index: str) -> list[str]:
            value = c_print.load("from", index, dtype)
            return [f"    for (int64_t j = 0; j < {count}; j++) {buffer}[j] = {value};"]

        place = f"{start} + j" if step == "1" else f"{start} + j * {step}"
        return [
            "{",
            f"    const {kind} *const from = {self._pointer(view, f'const {kind}', head=head)};",
            f"    const int64_t stride = {stride};",
            "    if (stride == 1) {",
            "        #pragma omp simd",
            *(f"    {line}" for line in loop(place)),
            "    } else {",
            *(f"    {line}" for line in loop(f"({place}) * stride")),
            "    }",
            "}",
        ]

    def _track(self, number: int, track: Track) -> list[str]:
        spec = self.spec
        lines, slot = [], "l"
        if track.cached:
            slot = "slot"
            lines.append("int64_t slot = position;")
            if spec.wraps:
                lines.append(f"slot = slot < 0 ? slot + {self._number(track.target, 4)} : slot;")
        if track.norm is not None and track.norm.weight:
            lines.append(f"{self.float} weight[{spec.width}];")
            lines += self._load("weight", track.norm.weight, "0", spec.width)
        lines += [
            f"for (int64_t h = 0; h < {track.heads}; h++) {{",
            *(f"    {x}" for x in self._head(track, slot)),
            "}",
        ]
        if track.cached:
            inside = f"if (slot >= 0 && slot < {self._number(track.target, 4)}) {{"
            loop = next(index for index, line in enumerate(lines) if line.startswith("int64_t slot"))
            loop += 2 if spec.wraps else 1
            lines = [*lines[:loop], inside, *(f"    {line}" for line in lines[loop:]), "}"]
        return [f"{{ // {c_print.identifier(track.source, (), '')}", *(f"    {line}" for line in lines), "}"]

    def _head(self, track: Track, slot: str) -> list[str]:
        spec = self.spec
        lines = [f"{self.float} x[{spec.width}] __attribute__((aligned(64)));"]
        lines += self._load("x", track.source, "h", spec.width)
        if track.norm is not None:
            kind = torch.float64 if self.float == "double" else torch.float32
            lines += [
                "double squares = 0;",
                "#pragma omp simd reduction(+:squares)",
                f"for (int64_t j = 0; j < {spec.width}; j++) squares += x[j] * x[j];",
                f"const double mean = squares / {float(spec.width)!r};",
                f"const {self.float} scale = ({self.float})(1.0 / sqrt(mean + {track.norm.eps!r}));",
            ]
            value = "x[j] * scale"
            if track.norm.weight:
                weight = "weight[j]"
                if track.norm.offset:
                    weight = f"(weight[j] + {c_print.literal(track.norm.offset, kind)})"
                value += f" * {weight}"
            lines += ["#pragma omp simd", f"for (int64_t j = 0; j < {spec.width}; j++) x[j] = {value};"]
        dtype = self.dtypes[track.target]
        stored = c_print.MEMORY[dtype]
        lines.append(f"{stored} *const to = {self._pointer(track.target, stored, slot, 'h')};")
        lines.append(f"const int64_t stride = {self._number(track.target, 3)};")
        if not track.rotates:
            return lines + self._stored("0", spec.width, lambda j: [(j, f"x[{j}]")], dtype)
        (near, step), (far, _) = self._part(0), self._part(1)
        cos_far, sin_far = ("cos", "sin") if spec.half_tables else ("cos_far", "sin_far")

        def turned(j: str) -> list[tuple[str, str]]:
            first = f"{near} + {j}" if step == "1" else f"{j} * 2"
            second = f"{far} + {j}" if step == "1" else f"{j} * 2 + 1"
            return [
                (first, f"x[{first}] * cos[{j}] - x[{second}] * sin[{j}]"),
                (second, f"x[{second}] * {cos_far}[{j}] + x[{first}] * {sin_far}[{j}]"),
            ]

        lines += self._stored("0", spec.half, turned, dtype)
        if spec.rest:
            lines += self._stored(str(spec.turned), spec.width, lambda j: [(j, f"x[{j}]")], dtype)
        return lines

    def _stored(
        self, first: str, stop: int, values: Callable[[str], list[tuple[str, str]]], dtype: torch.dtype
    ) -> list[str]:
        """Loops that write values, next to each other or apart."""
        lines = []
        for condition, stride in (("if (stride == 1) {", ""), ("} else {", " * stride")):
            lines += [condition, *(["    #pragma omp simd"] if not stride else [])]
            lines.append(f"    for (int64_t j = {first}; j < {stop}; j++) {{")
            for element, value in values("j"):
                index = f"({element}){stride}" if stride else element
                lines.append(f"        {c_print.store('to', index, dtype, value)}")
            lines.append("    }")
        return [*lines, "}"]
