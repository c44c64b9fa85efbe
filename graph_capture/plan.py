"""A static plan: the steps of an executor as one straight piece of Python, over buffers that exist beforehand.

Buffers of intermediate values are placed by lifetime in one arena for each device. Views of them and of the weights are
made once. What a call brings along, and what ops allocate themselves, are arguments and local variables of the
function, so that nothing of a call outlives it.
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from graph_capture.arena import Lifetime, live_peak, place
from graph_capture.errors import FusionError
from graph_capture.executor import Executor, Step
from graph_capture.forms import template
from graph_capture.graph import Arg
from graph_capture.ops import EXTERNAL, arg_indices, flatten_outputs, op
from graph_capture.survey import Form, Survey, Value

ALIGNMENT = {"cpu": 64, "cuda": 512}  # bytes, as torch's allocators align: kernels choose their way by it
Launch = Callable[[], None]
Tensors = Sequence[torch.Tensor]


@runtime_checkable
class Prepares(Protocol):
    """A step that can be bound to addresses."""

    def prepare(self, inputs: Tensors, outputs: Tensors) -> Launch:
        """A launch that reads `inputs` and writes `outputs` whenever it is called; it need not keep them alive.

        Raises:
            FusionError: they do not fit.
        """

    def failed(self, error: Exception, inputs: Tensors, outputs: Tensors) -> Launch:
        """What to launch in its place after `error`, which is raised where there is nothing."""


class Plan:
    """A bound replay.

    Args:
        executor: what to replay.
        survey: what a run of it has shown.
        fixed: the inputs (by slot) that are the same tensors, at the same addresses, in every replay.
        keep_outputs: results get memory of their own; otherwise they lie in the arena, until the next replay.

    Attributes:
        function: takes a tensor for each other input, in order, and returns the outputs.
        source: the function as Python.
        arenas: the memory of the intermediate values, by device.
        peak_bytes: its size in bytes, by device.
        eager_bytes: what the same values take at most, where each is allocated for as long as it lives.
        counts: what became of how many steps.
    """

    def __init__(
        self, executor: Executor, survey: Survey, fixed: Mapping[int, torch.Tensor], keep_outputs: bool
    ) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._builder = _Builder(executor, survey, fixed, keep_outputs)
        self.arenas, self.counts = self._builder.arenas, self._builder.counts
        self.peak_bytes, self.eager_bytes = self._builder.peak_bytes, self._builder.eager_bytes
        self.source = self._builder.text(traced=False)
        self.function = self._builder.compiled(self.source)
        self._traced: Callable[..., list[torch.Tensor]] | None = None

    @property
    def traced(self) -> Callable[..., list[torch.Tensor]]:
        """`function`, with each region under its name for a profiler."""
        if self._traced is None:
            self._traced = self._builder.compiled(self._builder.text(traced=True))
        return self._traced

    def __str__(self) -> str:
        sizes = [f"{d}: {size:,} bytes (eager: {self.eager_bytes[d]:,})" for d, size in self.peak_bytes.items()]
        counts = [f"{count} {name}" for name, count in self.counts.items() if count]
        return f"# arena: {', '.join(sizes) or 'none'}\n# steps: {', '.join(counts)}\n{self.source}"


class _Ref(str):
    """A variable of the plan."""


class _Builder:
    """Writes a plan line by line; what exists beforehand are the globals of its function."""

    def __init__(
        self, executor: Executor, survey: Survey, fixed: Mapping[int, torch.Tensor], keep_outputs: bool
    ) -> None:
        self._executor, self._survey = executor, survey
        self.namespace: dict[str, Any] = {}
        self._names = {"flat", "launches", "region", "error", "replay"}
        self._lines: list[tuple[str, str]] = []  # region, line
        self._label = ""
        self._temporary: list[str] = []
        self._functions: dict[int, _Ref] = {}
        self._launches: list[Launch] = []
        self.counts = dict.fromkeys(("views", "into the arena", "in place", "kernels", "calls"), 0)
        self._refs = {slot: self._name(executor.names[slot]) for slot in executor.inputs}
        self._brought = [self._refs[slot] for slot in executor.inputs if slot not in fixed]
        self.namespace |= {self._refs[slot]: tensor for slot, tensor in fixed.items()}
        self.namespace |= {
            "flat": flatten_outputs,
            "launches": self._launches,
            "region": torch.profiler.record_function,
        }
        self._holders: dict[str, int] = {}  # local variable -> how many living slots are in it
        returned = {self._value(slot).group for slot in executor.outputs}
        self._escaping = returned if keep_outputs else {g for g in returned if survey.groups[g].maker < 0}
        self._last = {
            self._value(slot).group: index
            for index, step in enumerate(executor.steps)
            for slot in (*step.reads, *step.fills)
        } | dict.fromkeys(returned, len(executor.steps))
        self.arenas: dict[torch.device, torch.Tensor] = {}
        self.peak_bytes: dict[torch.device, int] = {}
        self.eager_bytes: dict[torch.device, int] = {}
        self._buffers = self._place()
        for index, (step, form) in enumerate(zip(executor.steps, survey.forms, strict=True)):
            self._label = step.label
            self._step(index, step, form)
        planned = {slot for slot in executor.outputs if self._value(slot).group in self._buffers}
        self._results = [f"lend({self._refs[s]})" if s in planned else self._refs[s] for s in executor.outputs]
        if planned:
            self.namespace["lend"] = lend

    def text(self, traced: bool) -> str:
        """The function as Python."""
        lines = [f"def replay({', '.join(self._brought)}):"]
        label = ""
        for region, line in self._lines:
            if traced and region and region != label:
                lines.append(f"    with region({region!r}):")
            label = region
            indent = "        " if traced and region else "    "
            lines += [indent + part for part in line.split("\n")]
        return "\n".join([*lines, f"    return [{', '.join(self._results)}]\n"])

    def compiled(self, source: str) -> Callable[..., list[torch.Tensor]]:
        """The function of this source."""
        exec(compile(source, "<plan>", "exec"), self.namespace)
        return self.namespace.pop("replay")

    # --- memory

    def _place(self) -> dict[int, torch.Tensor]:
        """A tensor for the root of each group that is written into the arena."""
        devices: dict[torch.device, list[int]] = {}
        for number, group in enumerate(self._survey.groups):
            root = self._value(group.root)
            whole = root.offset == 0 and root.nbytes == group.nbytes
            if group.maker < 0 or not group.plain or not whole or number in self._escaping:
                continue
            step, form = self._executor.steps[group.maker], self._survey.forms[group.maker]
            if root.device.type in ALIGNMENT and (form.writer is not None or self._writes_itself(step, form)):
                devices.setdefault(root.device, []).append(number)
        buffers: dict[int, torch.Tensor] = {}
        for device, numbers in devices.items():
            groups = [self._survey.groups[number] for number in numbers]
            lives = [
                Lifetime(group.nbytes, group.maker, self._last[number])
                for number, group in zip(numbers, groups, strict=True)
            ]
            placed = place(lives, ALIGNMENT[device.type])
            self.peak_bytes[device], self.eager_bytes[device] = placed.peak, live_peak(lives)
            memory = self.arenas[device] = torch.empty(placed.peak, dtype=torch.uint8, device=device)
            for number, group, offset in zip(numbers, groups, placed.offsets, strict=True):
                root = self._value(group.root)
                empty = torch.empty(0, dtype=root.dtype, device=device)
                buffers[number] = empty.set_(
                    memory.untyped_storage(), offset // root.dtype.itemsize, root.shape, root.stride
                )
        return buffers

    def _writes_itself(self, step: Step, form: Form) -> bool:
        """Whether a kernel can be told where to put all of its results."""
        if not step.own or not isinstance(step.call, Prepares):
            return False
        for slot, same in zip(step.fills, form.same, strict=True):
            value = self._value(slot)
            group = self._survey.groups[value.group]
            if same is None and (group.root != slot or value.group in self._escaping or not group.plain):
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
        elif form.writer is not None and planned[0] is not None:
            out = self._static(self._executor.names[step.fills[0]], planned[0])
            self._refs[step.fills[0]] = out
            form.writer(self, given, out)
            self.counts["into the arena"] += 1
        elif self._writes_itself(step, form) and self._launched(step, form, given):
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
        if self._temporary:
            self._line(f"del {', '.join(self._temporary)}")
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

    def _launched(self, step: Step, form: Form, given: Sequence[_Ref]) -> bool:
        """A kernel, bound to addresses; beforehand where they are known, by the addresses of each call elsewhere."""
        kernel = step.call
        assert isinstance(kernel, Prepares)
        outs: list[_Ref] = []
        for slot, same in zip(step.fills, form.same, strict=True):
            buffer = self._buffers.get(self._value(slot).group)
            if same is None:
                assert buffer is not None
                outs.append(self._static(self._executor.names[slot], buffer))
            else:
                outs.append(given[same])
        try:
            if all(name in self.namespace for name in (*given, *outs)):
                number = len(self._launches)
                known = [[self.namespace[name] for name in names] for names in (given, outs)]
                self._launches.append(kernel.prepare(*known))
                renew = self._static("renew", _Renewed(kernel, *known, self._launches, number))
                self._line(f"try:\n    launches[{number}]()\nexcept Exception as error:\n    {renew}(error)")
            else:
                rebound = self._static("launch", _Rebound(kernel))
                self._line(f"{rebound}(({''.join(f'{n}, ' for n in given)}), ({''.join(f'{n}, ' for n in outs)}))")
        except FusionError:
            for out in outs:
                if out not in given:
                    del self.namespace[out]
            return False
        self._refs.update(zip(step.fills, outs, strict=True))
        return True

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
        if form.result == "tensor":
            self._line(f"{targets[0]} = {text}")
        else:
            self._line(f"{', '.join(targets)}, = {text if form.result == 'flat' else f'flat({text})'}")

    # --- what forms emit

    def view(self, function: Callable[..., Any], of: _Ref, *arguments: Any) -> _Ref:
        """A view: made now where what it views exists, at each replay elsewhere."""
        if of in self.namespace:
            return self._static(f"{of}_view", function(self.namespace[of], *arguments))
        name = self._name(f"{of}_view")
        text = ", ".join([of, *map(self._constant, arguments)])
        self._line(f"{name} = {self._function(function, '')}({text})")
        self._temporary.append(name)
        return name

    def call(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
        """A call for its effect, of variables and constants."""
        parts = [self._operand(value) for value in arguments]
        parts += [f"{name}={self._operand(value)}" for name, value in keywords.items()]
        self._line(f"{self._function(function, '')}({', '.join(parts)})")

    # --- text

    def _line(self, text: str) -> None:
        self._lines.append((self._label, text))

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


class _Renewed:
    """Replaces a launch that failed, for good."""

    def __init__(
        self, kernel: Prepares, inputs: Tensors, outputs: Tensors, launches: list[Launch], number: int
    ) -> None:
        self._kernel, self._known, self._launches, self._number = kernel, (inputs, outputs), launches, number

    def __call__(self, error: Exception) -> None:
        launch = self._launches[self._number] = self._kernel.failed(error, *self._known)
        launch()


class _Rebound:
    """Launches of one kernel for the addresses that calls have brought lately."""

    KEPT = 4  # callers that take turns, each with tensors of its own

    def __init__(self, kernel: Prepares) -> None:
        self._kernel = kernel
        self._known: dict[tuple[int, ...], Launch] = {}
        self._failure: Exception | None = None

    def __call__(self, inputs: Tensors, outputs: Tensors) -> None:
        if self._failure is None:
            key = tuple([tensor.data_ptr() for tensor in inputs])
            try:
                launch = self._known.get(key)
                if launch is None:
                    launch = self._kernel.prepare(inputs, outputs)
                    if len(self._known) == self.KEPT:
                        del self._known[next(iter(self._known))]
                    self._known[key] = launch
                launch()
                return
            except Exception as error:
                self._known.clear()
                self._failure = error
        self._kernel.failed(self._failure, inputs, outputs)()


def lend(tensor: torch.Tensor) -> torch.Tensor:
    """A new tensor over the same memory, no view of any other."""
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
