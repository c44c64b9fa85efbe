"""Writes a plan: which value goes where, which call becomes which line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from graph_capture.codegen.launches import Prepares
from graph_capture.errors import FusionError
from graph_capture.ir.binding import flatten_outputs, template
from graph_capture.ir.interpreter import Executor, Step
from graph_capture.ir.layouts import copy_into
from graph_capture.ir.ops import EXTERNAL, op
from graph_capture.log import log
from graph_capture.runtime.replay.arena import Arena, Lifetime, live_bytes
from graph_capture.runtime.replay.first_run import CallForm, FirstRun, SeenValue
from graph_capture.runtime.replay.script import Ref, Scope, Script

ALIGNMENT = {"cpu": 64, "cuda": 512}  # bytes, as torch's allocators align: kernels choose their way by it
CONSTANT = 2**20  # bytes of what depends on nothing and is kept
COPIED = 2**14  # bytes whose copy costs what a view costs,
BINDING = 8  # and how many views the binding of a kernel to new addresses costs
Arenas = Callable[[torch.device], Arena]


class Builder(Script):
    """Writes a plan line by line; what exists beforehand are the globals of its function."""

    def __init__(
        self,
        executor: Executor,
        first_run: FirstRun,
        static: Mapping[int, torch.Tensor],
        arena: Arenas,
        keep_outputs: bool,
        captured: bool,
    ) -> None:
        super().__init__()
        self._captured = captured
        self._executor, self._first_run, self._arena = executor, first_run, arena
        self.counts = dict.fromkeys(("views", "constants", "into the arena", "in place", "kernels", "calls"), 0)
        self._copied: set[int] = set()  # groups whose maker's result is copied into the arena
        self.lent: set[int] = set()
        self.lent_bytes = 0
        self._refs = {slot: self.name(executor.names[slot]) for slot in executor.inputs}
        self.arguments = [self._refs[slot] for slot in executor.inputs if slot not in static]
        self.namespace |= {self._refs[slot]: tensor for slot, tensor in static.items()}
        self._views: list[Ref] = []  # that the current step alone reads
        self._holders: dict[str, int] = {}  # local variable -> how many living slots are in it
        returned = {self._value(slot).group for slot in executor.outputs}
        self._returned = returned
        self._escaping = returned if keep_outputs else {g for g in returned if first_run.groups[g].maker < 0}
        self._last = {
            self._value(slot).group: index
            for index, step in enumerate(executor.steps)
            for slot in (*step.reads, *step.fills)
        } | dict.fromkeys(returned, len(executor.steps))
        self.live_bytes: dict[torch.device, Sequence[int]] = {}
        self.peak_bytes: dict[torch.device, int] = {}
        self.eager_bytes: dict[torch.device, int] = {}
        self.arenas: dict[torch.device, Arena] = {}
        self._saved: Counter[int] = Counter()  # group -> what a static address saves at each replay, in views
        for step, form in zip(executor.steps, first_run.forms, strict=True):
            if form.is_view:
                self._saved[self._value(step.fills[0]).group] += 1
            elif step.own and isinstance(step.call, Prepares):
                self._saved.update({self._value(slot).group: BINDING for slot in step.reads})
        self._copies: dict[int, Ref] = {}  # slot of an argument -> the buffer that kernels read it from
        self._once = self._constant_steps()
        self._buffers = self._place()
        self._copy_arguments()
        for index, (step, form) in enumerate(zip(executor.steps, first_run.forms, strict=True)):
            self.place = Scope(index, _described(step), step.label)
            self._step(index, step, form)
        planned = {slot for slot in executor.outputs if self._value(slot).group in self._buffers}
        self.results = [f"lend({self._refs[s]})" if s in planned else self._refs[s] for s in executor.outputs]
        if planned:
            self.namespace["lend"] = lend

    # --- memory

    def _place(self) -> dict[int, torch.Tensor]:
        """A tensor for the root of each group that is written into the arena."""
        buffers: dict[int, torch.Tensor] = {}
        devices: dict[torch.device, list[int]] = {}
        returned = self._returned - self._escaping
        for number, group in enumerate(self._first_run.groups):
            root = self._value(group.root)
            whole = root.offset == 0 and root.nbytes == group.nbytes
            outside = group.maker < 0 or group.maker in self._once or number in self._escaping
            if outside or not group.plain or not whole:
                continue
            step, form = self._executor.steps[group.maker], self._first_run.forms[group.maker]
            if root.device.type not in ALIGNMENT:
                continue
            if form.writer is None and not self._writes_itself(step, form):
                if not self._worth_a_copy(number, form):
                    continue
                self._copied.add(number)
            if number in returned:
                buffers[number] = strided(root, torch.empty(root.nbytes, dtype=torch.uint8, device=root.device), 0)
                self.lent.add(buffers[number].untyped_storage()._cdata)
                self.lent_bytes += root.nbytes
            else:
                devices.setdefault(root.device, []).append(number)
        for device, numbers in devices.items():
            groups = [self._first_run.groups[number] for number in numbers]
            lives = [
                Lifetime(group.nbytes, group.maker, self._last[number])
                for number, group in zip(numbers, groups, strict=True)
            ]
            arena = self._arena(device)
            placed = arena.place(lives, ALIGNMENT[device.type])
            self.live_bytes[device] = live_bytes(lives)
            self.peak_bytes[device], self.eager_bytes[device] = placed.peak, max(self.live_bytes[device])
            self.arenas[device] = arena
            for number, group, offset in zip(numbers, groups, placed.offsets, strict=True):
                buffers[number] = strided(self._value(group.root), *arena.at(offset))
        return buffers

    def _worth_a_copy(self, number: int, form: CallForm) -> bool:
        """Whether copying an op's result costs less than following it to where it comes to lie at each replay."""
        if self._captured or not form.is_pure or form.result != "tensor":
            return False
        return 0 < self._first_run.groups[number].nbytes <= COPIED * self._saved[number]

    def _copy_arguments(self) -> None:
        """Give kernels a static address of the small arguments that they read."""
        kernels = [step for step in self._executor.steps if step.own and isinstance(step.call, Prepares)]
        for slot in dict.fromkeys(slot for step in kernels for slot in step.reads):
            value, ref = self._value(slot), self._refs.get(slot)
            group = self._first_run.groups[value.group]
            if ref not in self.arguments or not group.plain or group.written or value.device.type not in ALIGNMENT:
                continue
            if 0 < value.nbytes <= COPIED * self._saved[value.group]:
                memory = torch.empty(value.nbytes, dtype=torch.uint8, device=value.device)
                self._copies[slot] = self.static(f"{ref}_copy", strided(value, memory, 0))
                self.line(f"{self._copying(value)}({self._copies[slot]}, {ref})")

    def _copying(self, value: SeenValue) -> str:
        """What writes into memory that is laid out like a value; torch refuses where elements of it are one."""
        plain = all(step != 0 or size < 2 for size, step in zip(value.shape, value.stride, strict=True))
        return self.function(torch.Tensor.copy_, "copy_") if plain else self.function(copy_into, "copy_into")

    def _constant_steps(self) -> set[int]:
        """The steps that depend on nothing which could change: they run once."""
        constant: set[int] = set()
        found: set[int] = set()
        for index, (step, form) in enumerate(zip(self._executor.steps, self._first_run.forms, strict=True)):
            if step.own or not (form.is_view or form.is_pure) or not constant.issuperset(step.reads):
                continue
            numbers = [self._value(slot).group for slot in step.fills]
            groups = [self._first_run.groups[number] for number in numbers]
            if self._returned.isdisjoint(numbers) and all(
                group.plain and not group.written and group.nbytes <= CONSTANT for group in groups
            ):
                constant.update(step.fills)
                if form.is_pure:
                    found.add(index)
        return found

    def _writes_itself(self, step: Step, form: CallForm) -> bool:
        """Whether a kernel can be told where to put all of its results."""
        if not step.own or not isinstance(step.call, Prepares):
            return False
        for slot, same in zip(step.fills, form.same, strict=True):
            value = self._value(slot)
            group = self._first_run.groups[value.group]
            if same is not None:
                continue
            if group.root != slot or not group.plain or (value.group in self._escaping and not step.call.movable):
                return False
        return True

    def _value(self, slot: int) -> SeenValue:
        value = self._first_run.values[slot]
        assert value is not None
        return value

    # --- steps

    def _step(self, index: int, step: Step, form: CallForm) -> None:
        given = [self._refs[slot] for slot in step.reads]
        planned = [self._buffers.get(self._value(slot).group) for slot in step.fills]
        if form.is_view and self._resolved(step, form, given):
            self.counts["views"] += 1
        elif index in self._once:
            found = flatten_outputs(step.call([self.namespace[name] for name in given]))
            for slot, tensor in zip(step.fills, found, strict=True):
                self._refs[slot] = self.static(self._executor.names[slot], tensor)
            self.counts["constants"] += 1
        elif form.writer is not None and planned[0] is not None:
            out = self.static(self._executor.names[step.fills[0]], planned[0])
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
        dead = []
        for slot in step.frees:
            holder = self._refs[slot]
            if holder in self._holders:
                self._holders[holder] -= 1
                if not self._holders[holder] and holder not in self.arguments:
                    dead.append(holder)
        self.drop([*self._views, *dead])
        self._views.clear()

    def _resolved(self, step: Step, form: CallForm, given: Sequence[Ref]) -> bool:
        """Make a view of what exists beforehand, once and for all."""
        value = self._value(step.fills[0])
        if not self.exists(*given) or value.group in self._escaping:
            return False
        if not self._first_run.groups[value.group].plain:
            return False
        found = flatten_outputs(step.call([self.namespace[name] for name in given]))
        for slot, tensor in zip(step.fills, found, strict=True):
            value = self._value(slot)
            if (tuple(tensor.shape), tensor.stride(), tensor.dtype) != (value.shape, value.stride, value.dtype):
                raise FusionError(f"{self._executor.names[slot]} is another view over planned memory")
            self._refs[slot] = self.static(self._executor.names[slot], tensor)
        return True

    def _at_fixed_addresses(self, step: Step) -> list[Ref]:
        return [self._copies.get(slot, self._refs[slot]) for slot in step.reads]

    def _launched(self, step: Step, form: CallForm, given: Sequence[Ref]) -> bool:
        """A kernel, bound to addresses; beforehand where they are known, by the addresses of each call elsewhere."""
        kernel = step.call
        assert isinstance(kernel, Prepares)
        outs: list[Ref] = []
        for slot, same in zip(step.fills, form.same, strict=True):
            buffer = self._buffers.get(self._value(slot).group)
            if same is not None:
                outs.append(given[same])
            elif buffer is not None:
                outs.append(self.static(self._executor.names[slot], buffer))
            else:
                outs.append(self._allocated(slot))
        try:
            self.launch(kernel, given, outs)
        except FusionError as error:
            log.debug("%s is not bound to addresses: %s", step.label, error)
            for out in outs:
                if out not in given:
                    del self.namespace[out]
            return False
        self._refs.update(zip(step.fills, outs, strict=True))
        return True

    def _allocated(self, slot: int) -> Ref:
        """Memory of its own for a value, at each replay."""
        value, name = self._value(slot), self.name(self._executor.names[slot])
        layout = f"{value.shape}, {value.stride}, dtype={self.constant(value.dtype)}"
        function = self.function(torch.empty_strided, "empty_strided")
        self.aside(f"{name} = {function}({layout}, device={self.constant(value.device)})")
        return name

    def _called(self, step: Step, form: CallForm, given: Sequence[Ref]) -> None:
        """A call that makes its own results, if any."""
        node = step.node
        if step.own or node.op_type == EXTERNAL:
            text = f"{self.function(step.call, step.label or node.op_type)}([{', '.join(given)}])"
        else:
            positional, keywords = template(node)
            parts = [self.written(value, given) for value in positional]
            parts += [f"{name}={self.written(value, given)}" for name, value in keywords.items()]
            text = f"{self.function(form.function or op(node.op_type).function, node.op_type)}({', '.join(parts)})"
        targets = []
        for slot, same in zip(step.fills, form.same, strict=True):
            self._refs[slot] = self.name(self._executor.names[slot]) if same is None else given[same]
            targets.append(self._refs[slot] if same is None else "_")
        if all(same is not None for same in form.same):
            self.line(text)
            self.counts["in place" if step.fills else "calls"] += 1
            return
        self.counts["calls"] += 1
        group = self._value(step.fills[0]).group
        if group in self._copied:
            out = self._refs[step.fills[0]] = self.static(self._executor.names[step.fills[0]], self._buffers[group])
            self.line(f"{self._copying(self._value(step.fills[0]))}({out}, {text})")
        elif form.result == "tensor":
            (self.aside if form.is_view else self.line)(f"{targets[0]} = {text}")
        else:
            self.line(f"{', '.join(targets)}, = {text if form.result == 'flat' else f'flat({text})'}")

    # --- what forms emit

    def view(self, function: Callable[..., Any], of: Ref, *arguments: Any) -> Ref:
        """A view: made now where what it views exists, at each replay elsewhere."""
        if of in self.namespace:
            return self.static(f"{of}_view", function(self.namespace[of], *arguments))
        name = self.name(f"{of}_view")
        text = ", ".join([of, *map(self.constant, arguments)])
        self.aside(f"{name} = {self.function(function, '')}({text})")
        self._views.append(name)
        return name

    def call(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
        """A call for its effect, of variables and constants."""
        parts = [self.operand(value) for value in arguments]
        parts += [f"{name}={self.operand(value)}" for name, value in keywords.items()]
        self.line(f"{self.function(function, '')}({', '.join(parts)})")


def _described(step: Step) -> str:
    """A step for people: its op, where it is, and the region that it is a part of."""
    node = step.node
    where = f" ({node.source.module})" if node.source is not None and node.source.module else ""
    return node.op_type + where + (f", as a part of {step.label}" if step.label else "")


def strided(value: SeenValue, memory: torch.Tensor, offset: int) -> torch.Tensor:
    """A value's tensor, from byte `offset` of a memory on."""
    empty = torch.empty(0, dtype=value.dtype, device=value.device)
    return empty.set_(memory.untyped_storage(), offset // value.dtype.itemsize, value.shape, value.stride)


def lend(tensor: torch.Tensor) -> torch.Tensor:
    """A new tensor over the same memory, no view of any other."""
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
