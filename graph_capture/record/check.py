"""Checks a recording against what really happened: replays it and compares.

A `RecordingCheck` watches, while the user's code runs, the memory that exists outside the recording: inputs, captured
tensors. It copies what recorded ops write before they do, and takes a checksum of everything (of parameters, which are
large and which nobody writes, by a sample); afterwards it replays the graph from the state before, compares
with the state after, and leaves everything as the code left it.

Where the two differ it replays again, from the same state: what replays differ by among themselves is the noise of ops
that are not deterministic, and the code may differ by a small multiple of it. Choices by noisy floats (argmax) are
taken as the code made them, as far as its candidates lie within noise (`graph_capture.ir.choices`).
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graph_capture.errors import UnrecordedWriteError
from graph_capture.ir.binding import prepare
from graph_capture.ir.choices import Choices, Forced, chooses
from graph_capture.ir.effects import is_random
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.interpreter import Call, Executor
from graph_capture.ir.memory import RandomState, Written, WrittenPart, storage_bytes
from graph_capture.ir.numerics import RUNS, STEADY, Spread, alike

_HINT = (
    "Something ran that torch does not see: a raw Triton or ctypes kernel, numpy on shared memory, a seed set inside. "
    "Wrap it as a torch.library custom op; record(..., verify=False) leaves this check out"
)
_UNINITIALISED = frozenset(
    f"aten.{name}"
    for name in ("empty.memory_format", "empty_like.default", "empty_strided.default", "empty_permuted.default")
) | {"aten.new_empty.default", "aten.new_empty_strided.default"}


ROUNDS = 3  # of replays, each without the choices that those before it could not have made
After = Mapping[int, list[torch.Tensor]]  # storage -> what was written of it, as the code left it
SAMPLE = 1024  # how many of a parameter's 8-byte words go into its checksum


@dataclass(frozen=True)
class CheckCost:
    """What the check of a recording cost: seconds, bytes of memory copied while it ran, and replays: more than one
    where ops are not deterministic."""

    seconds: float
    bytes: int
    replays: int = 1


class RecordingCheck:
    """Watches one recording; call the methods with recording suspended."""

    def __init__(self) -> None:
        self._random = RandomState()
        self._generators: dict[torch.Generator, torch.Tensor] = {}
        self._unwritten: dict[int, tuple[str, torch.Tensor, _Checksum]] = {}  # storage -> name, bytes, checksum
        self._written: dict[int, tuple[str, Written, _Checksum]] = {}  # storage -> name, what was there, checksum
        self._broken: str | None = None
        self._choices = Choices()

    def sees(self, name: str, tensor: torch.Tensor, storage: int) -> None:
        """`tensor` exists outside the recording."""
        if storage < 0 or storage in self._unwritten or storage in self._written or tensor.is_meta:
            return
        data = storage_bytes(tensor)
        step = max(1, data.numel() // 8 // SAMPLE) if isinstance(tensor, torch.nn.Parameter) else 1
        checksum = _Checksum(data, step)
        self._unwritten[storage] = (name, data, checksum)

    def before_write(self, storage: int, node: OpNode, tensors: Sequence[torch.Tensor], position: int) -> None:
        """A recorded op on `tensors` is about to write into the one at `position`, which lies in `storage`."""
        if storage in self._unwritten:
            name, data, checksum = self._unwritten.pop(storage)
            self._expect(name, checksum)
            self._written[storage] = (name, Written(data, tensors[position].dtype), checksum)
        if storage in self._written:
            self._written[storage][1].before(WrittenPart.written(node, tensors, position))

    def gave(self, node: OpNode, reads: Sequence[torch.dtype], outputs: Sequence[torch.Tensor]) -> None:
        """A recorded op has made `outputs` from tensors of these dtypes; called while recording."""
        if chooses(node, reads, outputs):
            with torch._C._DisableTorchDispatch():
                self._choices.keep(node, outputs)

    def draws(self, generator: Any) -> None:
        """A recorded op is about to draw from `generator`."""
        if isinstance(generator, torch.Generator) and generator not in self._generators:
            self._generators[generator] = generator.get_state()

    def rollback(self, random: bool) -> None:
        """Put memory back as it was before the recording; and the random generators, if `random`."""
        for _, written, _ in self._written.values():
            written.restore()
        if random:  # they belong to all threads: not touched without need
            self._random.restore()
        for generator, state in self._generators.items():
            generator.set_state(state)

    def check(
        self,
        graph: SubGraph,
        inputs: Sequence[torch.Tensor],
        captured: Mapping[str, torch.Tensor],
        outputs: Sequence[torch.Tensor],
    ) -> CheckCost:
        """Replay `graph` and compare with `outputs` and with what was written.

        Raises:
            UnrecordedWriteError: the replay computes something else than the code did.
        """
        start = time.perf_counter()
        for name, _, checksum in self._unwritten.values():
            self._expect(name, checksum)
        if self._broken is not None:
            raise UnrecordedWriteError(
                f"the memory of {self._broken!r} changed while recording, but no recorded op wrote it. {_HINT}"
            )
        after = {storage: written.read() for storage, (_, written, _) in self._written.items()}
        random = any(map(is_random, graph.nodes))
        drawn, generators = RandomState(), {g: g.get_state() for g in self._generators}
        tensors = [*inputs, *captured.values()]
        poisoned = [(node, _poisoned(node)) for node in graph.nodes]
        replays = 0

        def replay(steps: Iterable[tuple[OpNode, Call | None]] = poisoned) -> list[torch.Tensor]:
            nonlocal replays
            replays += 1
            self.rollback(random)
            return Executor(steps, graph.input_names, graph.output_names).run(tensors)

        try:
            problem, drew = self._elsewhere(), True
            if problem is None:
                problem = self._difference(graph, outputs, replay(), after)
                drew = not random or RandomState() == drawn
                if problem is not None and drew:
                    problem = self._beyond_noise(graph, outputs, after, poisoned, replay)
            if problem is not None:
                raise UnrecordedWriteError(f"replaying the recording {problem}. {_HINT}")
            if not drew:
                raise UnrecordedWriteError(
                    f"the recorded ops drew another amount from the random generator than the code did. {_HINT}"
                )
        finally:
            for storage, (_, written, _) in self._written.items():
                written.write(after[storage])
            if random:
                drawn.restore()
            for generator, state in generators.items():
                generator.set_state(state)
        copied = sum(2 * written.nbytes for _, written, _ in self._written.values())
        return CheckCost(time.perf_counter() - start, copied, replays)

    def _elsewhere(self) -> str | None:
        """What was written beside the parts that recorded ops write."""
        for _, written, _ in self._written.values():
            written.restore()
        for name, written, checksum in self._written.values():
            if not written.whole and not checksum.holds():
                return f"leaves other values in {name!r} than the code did"
        return None

    def _difference(
        self, graph: SubGraph, outputs: Sequence[torch.Tensor], replayed: Sequence[torch.Tensor], after: After
    ) -> str | None:
        """What a replay gives or leaves other than the code did, beyond rounding."""
        for name, expected, found in zip(graph.output_names, outputs, replayed, strict=True):
            if not alike(expected, found):
                return f"gives another {name!r} than the code did{_blame(graph, name)}"
        for storage, (name, written, _) in self._written.items():
            pairs = zip(written.numbers(after[storage]), written.numbers(written.read()), strict=True)
            if not all(alike(*pair) for pair in pairs):
                return f"leaves other values in {name!r} than the code did"
        return None

    def _beyond_noise(
        self,
        graph: SubGraph,
        outputs: Sequence[torch.Tensor],
        after: After,
        steps: Sequence[tuple[OpNode, Call | None]],
        replay: Callable[[Iterable[tuple[OpNode, Call | None]]], list[torch.Tensor]],
    ) -> str | None:
        """What replays give or leave other than the code did, beyond what they differ by among themselves."""
        choices = dict(self._choices.made)
        problem: str | None = None
        for _ in range(ROUNDS):
            forced, runs = Forced(choices), _Runs(graph, outputs, self._written, after)
            for number in range(1, RUNS + 1):
                runs.add(replay(forced.steps(steps)))
                refused, problem = forced.refused(), runs.problem()
                if number > 1 and problem is None and not refused:
                    return None
                if number == STEADY and not (forced.noisy or runs.noisy):
                    break
            if not refused:
                break
            choices |= refused  # they may be of no consequence: of memory that nobody filled, and that is masked
        return problem

    def _expect(self, name: str, checksum: _Checksum) -> None:
        if self._broken is None and not checksum.holds():
            self._broken = name


class _Checksum:
    """The sum of a memory's 8-byte words, or of every `step`-th of them; of a small memory on the CPU, its bytes."""

    def __init__(self, data: torch.Tensor, step: int) -> None:
        self._small = data if data.is_cpu and data.numel() <= 4096 else None
        if self._small is not None:
            self._bytes = _read(data)
            return
        words = data.numel() // 8 if data.data_ptr() % 8 == 0 else 0
        parts = (data[: words * 8].view(torch.int64)[::step], data[words * 8 :])
        self._parts = [part for part in parts if part.numel()]
        self._sums = [part.sum() for part in self._parts]

    def holds(self) -> bool:
        """Whether the memory still has that sum."""
        if self._small is not None:
            return _read(self._small) == self._bytes
        return all(torch.equal(part.sum(), total) for part, total in zip(self._parts, self._sums, strict=True))


def _read(data: torch.Tensor) -> bytes:
    return ctypes.string_at(data.data_ptr(), data.numel())  # numpy() would pin the storage's size


def orphaned(captured: Mapping[str, torch.Tensor], name: str) -> bool:
    """Whether `captured` is all that holds the tensor `name`.

    Such a tensor was replaced while the code ran (``self.state = self.state + 1``): at the next call the code would
    read another one. Memory that torch does not own (numpy's) is somebody else's to hold.
    """
    if _references(captured, name) > _references({name: torch.empty(0)}, name):
        return False
    tensor = captured[name]
    return tensor.layout == torch.strided and bool(tensor.untyped_storage().resizable())


def _references(table: Mapping[str, torch.Tensor], name: str) -> int:
    return sys.getrefcount(table[name])


def _poisoned(node: OpNode) -> Call | None:
    """For an op that leaves memory uninitialised: fill it with what no kernel would leave there."""
    if node.op_type not in _UNINITIALISED:
        return None
    call = prepare(node)

    def run(tensors: list[torch.Tensor]) -> torch.Tensor:
        result = call(tensors)
        if result.dtype is torch.bool:
            return result.fill_(True)
        return result.fill_(float("nan") if result.is_floating_point() or result.is_complex() else 77)

    return run


class _Runs:
    """What several replays gave and left, against what the code did."""

    def __init__(
        self,
        graph: SubGraph,
        outputs: Sequence[torch.Tensor],
        written: Mapping[int, tuple[str, Written, _Checksum]],
        after: After,
    ) -> None:
        self._graph, self._outputs, self._written = graph, outputs, written
        self._after = [(name, n) for key, (name, w, _) in written.items() for n in w.numbers(after[key])]
        self._given: list[Spread | None] = []
        self._left: list[Spread] = []

    def add(self, results: Sequence[torch.Tensor]) -> None:
        """Another replay gave `results`, and what it has written is in memory."""
        left = [numbers for _, written, _ in self._written.values() for numbers in written.numbers(written.read())]
        if not self._given and not self._left:
            self._given = [_spread(found) for found in results]
            self._left = [Spread(numbers, copy=False) for numbers in left]
            return
        for spread, found in zip(self._given, results, strict=True):
            if spread is not None:
                spread.add(found)
        for spread, numbers in zip(self._left, left, strict=True):
            spread.add(numbers)

    @property
    def noisy(self) -> bool:
        """Whether the replays differ among themselves."""
        return any(s is not None and s.noise > 0 for s in (*self._given, *self._left))

    def problem(self) -> str | None:
        """The first thing that the code did otherwise."""
        for name, wanted, spread in zip(self._graph.output_names, self._outputs, self._given, strict=True):
            excess = 0.0 if spread is None else spread.excess(wanted)
            if spread is not None and excess > 0:
                return f"gives another {name!r} than the code did{_by(excess, spread)}{_blame(self._graph, name)}"
        for (name, wanted), spread in zip(self._after, self._left, strict=True):
            if (excess := spread.excess(wanted)) > 0:
                return f"leaves other values in {name!r} than the code did{_by(excess, spread)}"
        return None


def _spread(found: torch.Tensor) -> Spread | None:
    return Spread(found) if found.layout is torch.strided and not found.is_meta else None


def _by(excess: float, spread: Spread) -> str:
    """By how much more than noise, where there is some."""
    return f" (by {excess:.2g} more than noise explains: replays differ by {spread.noise:.2g})" if spread.noise else ""


def _blame(graph: SubGraph, name: str) -> str:
    """Where the value `name` could have come from without a recorded op: memory that none of them filled."""
    needed, pending = set(), [name]
    while pending:
        index = graph.producers.get(pending.pop())
        if index is not None and index not in needed:
            needed.add(index)
            pending.extend(graph.nodes[index].inputs)
    for index in sorted(needed):
        node = graph.nodes[index]
        if node.op_type in _UNINITIALISED:
            return f"; it comes from {node.outputs[0]!r}, uninitialised memory made at {node.source}"
    last = graph.producers.get(name)
    return f", made at {graph.nodes[last].source}" if last is not None else ""
