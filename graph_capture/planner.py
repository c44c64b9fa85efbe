"""Writes a plan: which value goes where, which call becomes which line."""

from __future__ import annotations

import keyword
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graph_capture.arena import Lifetime, live_peak, place
from graph_capture.errors import FusionError
from graph_capture.executor import Executor, Step
from graph_capture.forms import template
from graph_capture.graph import Arg
from graph_capture.launches import Bound, Chain, Operand, Prepares
from graph_capture.log import log
from graph_capture.ops import EXTERNAL, arg_indices, flatten_outputs, op
from graph_capture.survey import Form, Survey, Value

ALIGNMENT = {"cpu": 64, "cuda": 512}  # bytes, as torch's allocators align: kernels choose their way by it
CONSTANT = 2**20  # bytes of what depends on nothing and is kept
COPIED = 2**14  # bytes whose copy costs what a view costs,
BINDING = 8  # and how many views the binding of a kernel to new addresses costs
Take = Callable[[torch.device, int], torch.Tensor]


class _Ref(str):
    """A variable of the plan."""


@dataclass(frozen=True)
class _Launch:
    """A kernel that the plan calls: its region, its operands, and the two together where these are always the same."""

    label: str
    kernel: Prepares
    inputs: tuple[_Ref, ...]
    outputs: tuple[_Ref, ...]
    fixed: Bound | None


class Builder:
    """Writes a plan line by line; what exists beforehand are the globals of its function."""

    def __init__(
        self, executor: Executor, survey: Survey, fixed: Mapping[int, torch.Tensor], take: Take, keep_outputs: bool
    ) -> None:
        self._executor, self._survey, self._take = executor, survey, take
        self.namespace: dict[str, Any] = {}
        self._names = {"flat", "region", "replay"}
        self._lines: list[tuple[str, str] | list[_Launch]] = []  # region and line; or kernels in a row
        self._pending: list[_Launch] = []  # kernels that the next lines may join
        self._label = ""
        self._temporary: list[str] = []
        self._functions: dict[int, _Ref] = {}
        self.counts = dict.fromkeys(("views", "constants", "into the arena", "in place", "kernels", "calls"), 0)
        self._copied: set[int] = set()  # groups whose maker's result is copied into the arena
        self.lent: set[int] = set()
        self._refs = {slot: self._name(executor.names[slot]) for slot in executor.inputs}
        self._brought = [self._refs[slot] for slot in executor.inputs if slot not in fixed]
        self.namespace |= {self._refs[slot]: tensor for slot, tensor in fixed.items()}
        self.namespace |= {
            "flat": flatten_outputs,
            "region": torch.profiler.record_function,
        }
        self._holders: dict[str, int] = {}  # local variable -> how many living slots are in it
        returned = {self._value(slot).group for slot in executor.outputs}
        self._returned = returned
        self._escaping = returned if keep_outputs else {g for g in returned if survey.groups[g].maker < 0}
        self._last = {
            self._value(slot).group: index
            for index, step in enumerate(executor.steps)
            for slot in (*step.reads, *step.fills)
        } | dict.fromkeys(returned, len(executor.steps))
        self.peak_bytes: dict[torch.device, int] = {}
        self.eager_bytes: dict[torch.device, int] = {}
        self._saved: Counter[int] = Counter()  # group -> what a fixed address saves at each replay, in views
        for step, form in zip(executor.steps, survey.forms, strict=True):
            if form.is_view:
                self._saved[self._value(step.fills[0]).group] += 1
            elif isinstance(step.call, Prepares):
                self._saved.update({self._value(slot).group: BINDING for slot in step.reads})
        self._copies: dict[int, _Ref] = {}  # slot of an argument -> the buffer that kernels read it from
        self._once = self._constant_steps()
        self._buffers = self._place()
        self._copy_arguments()
        for index, (step, form) in enumerate(zip(executor.steps, survey.forms, strict=True)):
            self._label = step.label
            self._step(index, step, form)
        self._flush()
        planned = {slot for slot in executor.outputs if self._value(slot).group in self._buffers}
        self._results = [f"lend({self._refs[s]})" if s in planned else self._refs[s] for s in executor.outputs]
        if planned:
            self.namespace["lend"] = lend

    def text(self, traced: bool) -> str:
        """The function as Python."""
        lines = [f"def replay({', '.join(self._brought)}):"]
        label = ""
        for entry in self._lines:
            if isinstance(entry, list):
                parts = [(kernel.label, self._chained([kernel])) for kernel in entry] if traced else []
                found = parts or [("", self._chained(entry))]
            else:
                found = [entry]
            for region, line in found:
                if traced and region and region != label:
                    lines.append(f"    with region({region!r}):")
                label = region
                lines.append(("        " if traced and region else "    ") + line)
        return "\n".join([*lines, f"    return [{', '.join(self._results)}]\n"])

    def _chained(self, kernels: Sequence[_Launch]) -> str:
        """The call of kernels in a row."""
        refs = (ref for kernel in kernels if kernel.fixed is None for ref in (*kernel.inputs, *kernel.outputs))
        brought = {ref: number for number, ref in enumerate(dict.fromkeys(r for r in refs if r not in self.namespace))}

        def operands(refs: Sequence[_Ref]) -> list[Operand]:
            return [brought[ref] if ref in brought else self.namespace[ref] for ref in refs]

        bound = [k.fixed or Bound(k.kernel, operands(k.inputs), operands(k.outputs)) for k in kernels]
        return f"{self._static('kernels', Chain(bound))}({', '.join(brought)})"

    def compiled(self, source: str) -> Callable[..., list[torch.Tensor]]:
        """The function of this source."""
        exec(compile(source, "<plan>", "exec"), self.namespace)
        return self.namespace.pop("replay")

    # --- memory

    def _place(self) -> dict[int, torch.Tensor]:
        """A tensor for the root of each group that is written into the arena."""
        buffers: dict[int, torch.Tensor] = {}
        devices: dict[torch.device, list[int]] = {}
        returned = self._returned - self._escaping
        for number, group in enumerate(self._survey.groups):
            root = self._value(group.root)
            whole = root.offset == 0 and root.nbytes == group.nbytes
            outside = group.maker < 0 or group.maker in self._once or number in self._escaping
            if outside or not group.plain or not whole:
                continue
            step, form = self._executor.steps[group.maker], self._survey.forms[group.maker]
            if root.device.type not in ALIGNMENT:
                continue
            if form.writer is None and not self._writes_itself(step, form):
                if not self._worth_a_copy(number, form):
                    continue
                self._copied.add(number)
            if number in returned:
                buffers[number] = strided(root, torch.empty(root.nbytes, dtype=torch.uint8, device=root.device), 0)
                self.lent.add(buffers[number].untyped_storage()._cdata)
            else:
                devices.setdefault(root.device, []).append(number)
        for device, numbers in devices.items():
            groups = [self._survey.groups[number] for number in numbers]
            lives = [
                Lifetime(group.nbytes, group.maker, self._last[number])
                for number, group in zip(numbers, groups, strict=True)
            ]
            placed = place(lives, ALIGNMENT[device.type])
            self.peak_bytes[device], self.eager_bytes[device] = placed.peak, live_peak(lives)
            arena = self._take(device, placed.peak)
            for number, group, offset in zip(numbers, groups, placed.offsets, strict=True):
                buffers[number] = strided(self._value(group.root), arena, offset)
        return buffers

    def _worth_a_copy(self, number: int, form: Form) -> bool:
        """Whether copying an op's result costs less than following it to where it comes to lie at each replay."""
        if not form.is_pure or form.result != "tensor":
            return False
        return 0 < self._survey.groups[number].nbytes <= COPIED * self._saved[number]

    def _copy_arguments(self) -> None:
        """Give kernels a fixed address of the small arguments that they read."""
        kernels = [step for step in self._executor.steps if isinstance(step.call, Prepares)]
        for slot in dict.fromkeys(slot for step in kernels for slot in step.reads):
            value, ref = self._value(slot), self._refs.get(slot)
            group = self._survey.groups[value.group]
            if ref not in self._brought or not group.plain or group.written or value.device.type not in ALIGNMENT:
                continue
            if 0 < value.nbytes <= COPIED * self._saved[value.group]:
                memory = torch.empty(value.nbytes, dtype=torch.uint8, device=value.device)
                self._copies[slot] = self._static(f"{ref}_copy", strided(value, memory, 0))
                self._line(f"{self._function(torch.Tensor.copy_, 'copy_')}({self._copies[slot]}, {ref})")

    def _constant_steps(self) -> set[int]:
        """The steps that depend on nothing which could change: they run once."""
        constant: set[int] = set()
        found: set[int] = set()
        for index, (step, form) in enumerate(zip(self._executor.steps, self._survey.forms, strict=True)):
            if step.own or not (form.is_view or form.is_pure) or not constant.issuperset(step.reads):
                continue
            numbers = [self._value(slot).group for slot in step.fills]
            groups = [self._survey.groups[number] for number in numbers]
            if self._returned.isdisjoint(numbers) and all(
                group.plain and not group.written and group.nbytes <= CONSTANT for group in groups
            ):
                constant.update(step.fills)
                if form.is_pure:
                    found.add(index)
        return found

    def _writes_itself(self, step: Step, form: Form) -> bool:
        """Whether a kernel can be told where to put all of its results."""
        if not step.own or not isinstance(step.call, Prepares):
            return False
        for slot, same in zip(step.fills, form.same, strict=True):
            value = self._value(slot)
            group = self._survey.groups[value.group]
            if same is not None:
                continue
            if group.root != slot or not group.plain or (value.group in self._escaping and not step.call.movable):
                return False
        return True

    def _value(self, slot: int) -> Value:
        value = self._survey.values[slot]
        assert value is not None
        return value

    # --- steps

    def _step(self, index: int, step: Step, form: Form) -> None:
        given = [self._refs[slot] for slot in step.reads]
        planned = [self._buffers.get(self._value(slot).group) for slot in step.fills]
        if form.is_view and self._resolved(step, form, given):
            self.counts["views"] += 1
        elif index in self._once:
            found = flatten_outputs(step.call([self.namespace[name] for name in given]))
            for slot, tensor in zip(step.fills, found, strict=True):
                self._refs[slot] = self._static(self._executor.names[slot], tensor)
            self.counts["constants"] += 1
        elif form.writer is not None and planned[0] is not None:
            out = self._static(self._executor.names[step.fills[0]], planned[0])
            self._refs[step.fills[0]] = out
            form.writer(self, given, out)
            self.counts["into the arena"] += 1
        elif self._writes_itself(step, form) and self._launched(step, form, self._at_fixed_addresses(step)):
            self.counts["kernels"] += 1
        else:
            self._called(step, form, given)
        for slot in (*step.fills, *step.frees):
            holder = self._refs[slot]
            if holder not in self.namespace:
                self._holders[holder] = self._holders.get(holder, 0) + (1 if slot in step.fills else 0)
        for slot in step.frees:
            holder = self._refs[slot]
            if holder in self._holders:
                self._holders[holder] -= 1
                if not self._holders[holder] and holder not in self._brought:
                    self._temporary.append(holder)
        if not self._pending:
            self._delete()

    def _delete(self) -> None:
        """Drop the variables that nothing needs any more."""
        if self._temporary:
            self._aside(f"del {', '.join(self._temporary)}")
            self._temporary.clear()

    def _resolved(self, step: Step, form: Form, given: Sequence[_Ref]) -> bool:
        """Make a view of what exists beforehand, once and for all."""
        value = self._value(step.fills[0])
        if not all(name in self.namespace for name in given) or value.group in self._escaping:
            return False
        if not self._survey.groups[value.group].plain:
            return False
        found = flatten_outputs(step.call([self.namespace[name] for name in given]))
        for slot, tensor in zip(step.fills, found, strict=True):
            value = self._value(slot)
            if (tuple(tensor.shape), tensor.stride(), tensor.dtype) != (value.shape, value.stride, value.dtype):
                raise FusionError(f"{self._executor.names[slot]} is another view over planned memory")
            self._refs[slot] = self._static(self._executor.names[slot], tensor)
        return True

    def _at_fixed_addresses(self, step: Step) -> list[_Ref]:
        return [self._copies.get(slot, self._refs[slot]) for slot in step.reads]

    def _launched(self, step: Step, form: Form, given: Sequence[_Ref]) -> bool:
        """A kernel, bound to addresses; beforehand where they are known, by the addresses of each call elsewhere."""
        kernel = step.call
        assert isinstance(kernel, Prepares)
        outs: list[_Ref] = []
        for slot, same in zip(step.fills, form.same, strict=True):
            buffer = self._buffers.get(self._value(slot).group)
            if same is not None:
                outs.append(given[same])
            elif buffer is not None:
                outs.append(self._static(self._executor.names[slot], buffer))
            else:
                outs.append(self._allocated(slot))
        fixed = None
        if all(name in self.namespace for name in (*given, *outs)):
            try:
                fixed = Bound(kernel, [self.namespace[n] for n in given], [self.namespace[n] for n in outs])
            except FusionError as error:
                log.debug("%s is not bound to addresses: %s", step.label, error)
                for out in outs:
                    if out not in given:
                        del self.namespace[out]
                return False
        self._refs.update(zip(step.fills, outs, strict=True))
        self._pending.append(_Launch(self._label, kernel, tuple(given), tuple(outs), fixed))
        return True

    def _allocated(self, slot: int) -> _Ref:
        """Memory of its own for a value, at each replay."""
        value, name = self._value(slot), self._name(self._executor.names[slot])
        layout = f"{value.shape}, {value.stride}, dtype={self._constant(value.dtype)}"
        function = self._function(torch.empty_strided, "empty_strided")
        self._aside(f"{name} = {function}({layout}, device={self._constant(value.device)})")
        return name

    def _called(self, step: Step, form: Form, given: Sequence[_Ref]) -> None:
        """A call that makes its own results, if any."""
        node = step.node
        if step.own or node.op_type == EXTERNAL:
            text = f"{self._function(step.call, step.label or node.op_type)}([{', '.join(given)}])"
        else:
            positional, keywords = template(node)
            parts = [self._written(value, given) for value in positional]
            parts += [f"{name}={self._written(value, given)}" for name, value in keywords.items()]
            text = f"{self._function(form.function or op(node.op_type).function, node.op_type)}({', '.join(parts)})"
        targets = []
        for slot, same in zip(step.fills, form.same, strict=True):
            self._refs[slot] = self._name(self._executor.names[slot]) if same is None else given[same]
            targets.append(self._refs[slot] if same is None else "_")
        if all(same is not None for same in form.same):
            self._line(text)
            self.counts["in place" if step.fills else "calls"] += 1
            return
        self.counts["calls"] += 1
        group = self._value(step.fills[0]).group
        if group in self._copied:
            out = self._refs[step.fills[0]] = self._static(self._executor.names[step.fills[0]], self._buffers[group])
            self._line(f"{self._function(torch.Tensor.copy_, 'copy_')}({out}, {text})")
        elif form.result == "tensor":
            (self._aside if form.is_view else self._line)(f"{targets[0]} = {text}")
        else:
            self._line(f"{', '.join(targets)}, = {text if form.result == 'flat' else f'flat({text})'}")

    # --- what forms emit

    def view(self, function: Callable[..., Any], of: _Ref, *arguments: Any) -> _Ref:
        """A view: made now where what it views exists, at each replay elsewhere."""
        if of in self.namespace:
            return self._static(f"{of}_view", function(self.namespace[of], *arguments))
        name = self._name(f"{of}_view")
        text = ", ".join([of, *map(self._constant, arguments)])
        self._aside(f"{name} = {self._function(function, '')}({text})")
        self._temporary.append(name)
        return name

    def call(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
        """A call for its effect, of variables and constants."""
        parts = [self._operand(value) for value in arguments]
        parts += [f"{name}={self._operand(value)}" for name, value in keywords.items()]
        self._line(f"{self._function(function, '')}({', '.join(parts)})")

    # --- text

    def _line(self, text: str) -> None:
        self._flush()
        self._lines.append((self._label, text))

    def _aside(self, text: str) -> None:
        """A line that computes nothing, and may come before kernels that are pending."""
        self._lines.append((self._label, text))

    def _flush(self) -> None:
        """End a row of kernels."""
        if self._pending:
            self._lines.append(self._pending)
            self._pending = []
            self._delete()

    def _name(self, wish: str) -> _Ref:
        base = re.sub(r"\W", "_", wish) or "value"
        if base[0].isdigit() or keyword.iskeyword(base):
            base = f"v{base}"
        name, number = base, 1
        while name in self._names:
            name, number = f"{base}_{number}", number + 1
        self._names.add(name)
        return _Ref(name)

    def _static(self, wish: str, value: Any) -> _Ref:
        name = self._name(wish)
        self.namespace[name] = value
        return name

    def _function(self, function: Callable[..., Any], wish: str) -> _Ref:
        if id(function) not in self._functions:
            name = getattr(function, "__name__", wish) if "<" not in getattr(function, "__name__", "<") else wish
            self._functions[id(function)] = self._static(f"op_{name}", function)
        return self._functions[id(function)]

    def _written(self, value: Any, given: Sequence[_Ref]) -> str:
        """An argument as text."""
        if isinstance(value, Arg):
            return given[value.index]
        if isinstance(value, tuple) and arg_indices(value):
            return f"[{', '.join(self._written(item, given) for item in value)}]"
        return self._constant(list(value) if isinstance(value, tuple) else value)

    def _operand(self, value: Any) -> str:
        if isinstance(value, _Ref):
            return value
        if isinstance(value, list) and any(isinstance(item, _Ref) for item in value):
            return f"[{', '.join(map(self._operand, value))}]"
        return self._constant(value)

    def _constant(self, value: Any) -> str:
        if type(value) in (bool, int, type(None)) or (type(value) is float and math.isfinite(value)):
            return repr(value)
        if isinstance(value, (tuple, list)) and all(type(item) in (bool, int) for item in value):
            return repr(value)
        return self._static(str(value) if isinstance(value, (torch.dtype, str)) else "constant", value)


def strided(value: Value, memory: torch.Tensor, offset: int) -> torch.Tensor:
    """A value's tensor, from byte `offset` of a memory on."""
    empty = torch.empty(0, dtype=value.dtype, device=value.device)
    return empty.set_(memory.untyped_storage(), offset // value.dtype.itemsize, value.shape, value.stride)


def lend(tensor: torch.Tensor) -> torch.Tensor:
    """A new tensor over the same memory, no view of any other."""
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
