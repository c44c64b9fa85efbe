"""Kernels bound to addresses, called in a row, and what becomes of one that fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from graph_capture.errors import FusionError

Launch = Callable[[], object]
Tensors = Sequence[torch.Tensor]
Operand = torch.Tensor | int  # a tensor that is always the same, or the number of an argument that a call brings


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

    @property
    def movable(self) -> bool:
        """Whether its launches are `Movable`: then binding one to other addresses costs next to nothing."""


@runtime_checkable
class Movable(Protocol):
    """A launch that can be told where tensors lie, and be made one call with others of its kind."""

    def __call__(self) -> object: ...

    def move(self, tensor: int, address: int) -> None:
        """From now on the tensor of this number (inputs first) lies there."""

    def join(self, others: Sequence[Movable]) -> Launch:
        """This launch and then the others as one, which follows when they are moved."""


Ref = TypeVar("Ref")


class Emit(Protocol[Ref]):
    """Where a form puts its calls: they are run at once, or written down."""

    def view(self, function: Callable[..., Any], of: Ref, *arguments: Any) -> Ref:
        """A view of a value."""

    def call(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
        """A call for its effect."""

    def exists(self, *values: Ref) -> bool:
        """Whether these are the same tensors each time, so that `launch` can take them."""

    def launch(self, kernel: Prepares, inputs: Sequence[Ref], outputs: Sequence[Ref]) -> None:
        """A kernel, bound to the addresses of values that exist."""


class Writer(Protocol):
    """Emits the calls that compute an op of `inputs` into `out`."""

    def __call__(self, emit: Emit[Any], inputs: Sequence[Any], out: Any) -> None: ...


class HalfwayError(RuntimeError):
    """A launch has failed after it may have written: it is not to run again."""


class BoundKernel:
    """A kernel on these tensors, some of which each call brings."""

    KEPT = 4  # callers that take turns, each with tensors of its own

    def __init__(self, kernel: Prepares, inputs: Sequence[Operand], outputs: Sequence[Operand]) -> None:
        self._kernel, self._inputs, self._outputs = kernel, inputs, outputs
        operands = enumerate((*inputs, *outputs))
        self.dynamic = [(number, which) for number, which in operands if isinstance(which, int)]
        self._known: dict[tuple[int, ...], Launch] = {}
        self._movable: Movable | None = None
        self.error: Exception | None = None
        if not self.dynamic:
            self.launch((), ())

    def launch(self, dynamic: Tensors, addresses: Sequence[int]) -> Launch:
        """A launch for arguments that lie at these addresses.

        Raises:
            FusionError: the tensors do not fit the kernel.
        """
        if self.error is not None:
            return self._kernel.failed(self.error, *self._tensors(dynamic))
        if self._movable is not None:
            for number, which in self.dynamic:
                self._movable.move(number, addresses[which])
            return self._movable
        key = tuple([addresses[which] for _, which in self.dynamic])
        launch = self._known.get(key)
        if launch is None:
            launch = self._kernel.prepare(*self._tensors(dynamic))
            if isinstance(launch, Movable):
                self._movable = launch
                return launch
            if len(self._known) == self.KEPT:
                del self._known[next(iter(self._known))]
            self._known[key] = launch
        return launch

    @property
    def scratch(self) -> list[torch.Tensor]:
        """Memory that its launches have for themselves."""
        return [tensor for launch in self._known.values() for tensor in getattr(launch, "scratch", ())]

    def _tensors(self, dynamic: Tensors) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        inputs, outputs = (
            [dynamic[t] if isinstance(t, int) else t for t in ts] for ts in (self._inputs, self._outputs)
        )
        return inputs, outputs


class Chain:
    """Kernels, one after the other, in as few calls as possible.

    Calling it takes the tensors that vary, in the order of their numbers.
    """

    def __init__(self, kernels: Sequence[BoundKernel]) -> None:
        self._kernels = kernels
        self._addresses: list[int] | None = None  # that the launches are for
        self._moves: dict[int, list[tuple[Movable, int]]] | None = None  # who is to be told of an argument's address
        self._launches: list[Launch] = []
        self._behind: list[list[BoundKernel]] = []  # the kernels of each launch

    @property
    def scratch(self) -> list[torch.Tensor]:
        """Memory that its launches have for themselves: whoever captures them keeps it."""
        return [tensor for kernel in self._kernels for tensor in kernel.scratch]

    def __call__(self, *dynamic: torch.Tensor) -> None:
        addresses = [tensor.data_ptr() for tensor in dynamic]
        if any(map(torch.Tensor.is_neg, dynamic)) or any(map(torch.Tensor.is_conj, dynamic)):
            self._refuse(FusionError("a tensor is a view that negates or conjugates"))
        if addresses != self._addresses:
            self._bind(dynamic, addresses)
        number = 0
        try:
            for launch in self._launches:
                launch()
                number += 1
        except HalfwayError:
            raise
        except Exception as error:
            self._go_on(number, error, dynamic)

    def _refuse(self, error: Exception) -> None:
        """Give up the kernels that read or write what a call brings."""
        for kernel in self._kernels:
            if kernel.dynamic and kernel.error is None:
                kernel.error = error
        self._addresses = None

    def _bind(self, dynamic: Tensors, addresses: list[int]) -> None:
        before = self._addresses
        if before is not None and self._moves is not None:
            for which, address in enumerate(addresses):
                if address != before[which]:
                    for launch, number in self._moves.get(which, ()):
                        launch.move(number, address)
            self._addresses = addresses
            return
        launches = []
        for kernel in self._kernels:
            try:
                launches.append(kernel.launch(dynamic, addresses))
            except Exception as error:
                if kernel.error is not None:
                    raise
                kernel.error = error
                launches.append(kernel.launch(dynamic, addresses))
        self._launches, self._behind, self._moves = [], [], {}
        pairs = list(zip(launches, self._kernels, strict=True))
        for joins, group in groupby(pairs, lambda pair: isinstance(pair[0], Movable)):
            parts, kernels = zip(*group, strict=True)
            self._launches += [parts[0].join(parts[1:])] if joins and len(parts) > 1 else parts
            self._behind += [list(kernels)] if joins else [[kernel] for kernel in kernels]
        for made, kernel in pairs:
            for number, which in kernel.dynamic:
                if not isinstance(made, Movable):
                    self._moves = None
                elif self._moves is not None:
                    self._moves.setdefault(which, []).append((made, number))
        # What stands for a kernel that failed holds the tensors that it is for.
        self._addresses = None if any(kernel.error and kernel.dynamic for kernel in self._kernels) else addresses

    def _go_on(self, number: int, error: Exception, dynamic: Tensors) -> None:
        """The rest of a call, from the launch that raised on."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise error  # a capture that has failed says nothing about the kernel
        if any(kernel.error is not None for kernel in self._behind[number]):
            raise error
        for kernel in self._behind[number]:
            kernel.error = error
        self._addresses = None
        Chain([kernel for kernels in self._behind[number:] for kernel in kernels])(*dynamic)
