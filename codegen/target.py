"""`Target`: what makes kernels run somewhere, and the targets that there are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from graph_capture.cache import DiskCache
from graph_capture.codegen.spec import lower as lowering
from graph_capture.codegen.spec.kernel import BuildRequest, Spec
from graph_capture.codegen.spec.rows import Definitions
from graph_capture.errors import CaptureError, FusionError
from graph_capture.ir.binding import expression
from graph_capture.ir.graph import SubGraph
from graph_capture.ir.values import TensorMeta

Binding = Callable[[Sequence[torch.Tensor], int], Callable[[], Any]]  # tensors, candidate -> what launches on them
TARGETS: dict[str, Target] = {}  # by name, in the order in which "auto" asks them


class Target(ABC):
    """One way to make kernels of regions. A subclass is made known by `register_target`.

    Attributes:
        name: what ``FusionConfig(target=...)`` calls it.
        movable: whether its launches can be told where tensors lie; see `graph_capture.codegen.launches.Movable`.
    """

    name: ClassVar[str]
    movable: ClassVar[bool] = False

    # --- where it runs

    @abstractmethod
    def available(self, device: torch.device, cache: DiskCache | None = None) -> str | None:
        """Why its kernels cannot run on tensors of `device`, or None.

        What it has to compile to find out is kept in `cache`.
        """

    def serves(self, device: torch.device) -> bool:
        """Whether ``target="auto"`` takes it for tensors of `device`."""
        return False

    def interpreted(self) -> bool:
        """Whether kernels give right numbers but no speed."""
        return False

    def start(self) -> None:  # noqa: B027
        """Called once somebody is going to ask for kernels: what takes long to start may start here."""

    # --- what it can compute

    def check_ops(self, graph: SubGraph) -> None:
        """Look at the ops of a region whose layouts are not known.

        Raises:
            FusionError: they cannot be one kernel.
        """
        lowering.check_ops(graph)

    def lower(self, graph: SubGraph, values: Mapping[str, TensorMeta], define: Definitions = expression) -> Spec:
        """The description of the kernel that computes `graph`; the project's own lowerings unless it has others.

        Args:
            graph: a region's body.
            values: the layout of each of its values.
            define: gives the scalar expressions of ops.

        Raises:
            FusionError: it cannot be one kernel; the message says why.
        """
        return lowering.lower(graph, values, define)

    @abstractmethod
    def accept(self, spec: Spec) -> None:
        """Raise FusionError if it has no way to compute this."""

    # --- how it is made

    @abstractmethod
    def source(self, spec: Spec) -> str:
        """The code of a spec."""

    def artifacts(self, spec: Spec, kernel_name: str) -> Mapping[str, str]:
        """What `build` makes on the way, as texts under file names, in the order in which they are made.

        That is the source that is really compiled, and the machine code as text where there is a tool for it.

        Raises:
            FusionError: it cannot be compiled.
        """
        return {}

    @abstractmethod
    def build(self, spec: Spec, kernel_name: str, cache: DiskCache | None = None) -> Binding:
        """Compile a spec, or find it in `cache`; the result binds it to the tensors of a call, inputs first, and to one
        of the `candidates`."""

    def check(self, tensors: Sequence[torch.Tensor]) -> None:  # noqa: B027
        """Raise FusionError if kernels cannot run on these tensors."""

    def candidates(self, spec: Spec, tensors: Sequence[torch.Tensor]) -> int:
        """How many ways to cut the work on a call's tensors there are, the expected fastest first; at most four."""
        return 1

    def prepare(self, requests: Sequence[BuildRequest], cache: DiskCache | None = None) -> None:  # noqa: B027
        """Compile kernels side by side into `cache`, as far as that saves time later."""

    def compiles(self, architecture: str) -> bool:
        """Whether it makes machine code for processors called this, which need not be here."""
        return False

    def compile_for(self, specs: Sequence[tuple[Spec, str]], architecture: str) -> list[tuple[Any, ...]]:
        """Machine code of kernels (their specs and names) for a processor that need not be here.

        Raises:
            FusionError: it cannot, or the compiler fails.
        """
        raise FusionError(f"the target {self.name!r} does not compile ahead of time")


def register_target(target: Target) -> Target:
    """Make a target known by its name: to ``FusionConfig(target=...)``, and to "auto" where it `serves`.

    "auto" asks the targets in the order in which they were registered, the project's own first.

    Raises:
        CaptureError: it is no `Target`, or one of that name is registered already.
    """
    if not isinstance(target, Target):
        raise CaptureError(f"a target is an instance of a subclass of Target, not a {type(target).__name__}")
    if target.name in TARGETS or target.name == "auto":
        raise CaptureError(f"a target named {target.name!r} is registered already")
    TARGETS[target.name] = target
    return target


def unregister_target(name: str) -> None:
    """Forget a target that `register_target` made known.

    Raises:
        CaptureError: there is none of that name.
    """
    if TARGETS.pop(name, None) is None:
        raise CaptureError(f"there is no target {name!r}; there are {', '.join(map(repr, TARGETS))}")


def chosen_target(name: str, device: torch.device) -> Target:
    """The target of that name; for "auto" the first that serves `device`.

    Raises:
        FusionError: there is none.
    """
    if name != "auto" and name in TARGETS:
        return TARGETS[name]
    if name != "auto":
        raise FusionError(f"there is no target {name!r}; use {', '.join(map(repr, ('auto', *TARGETS)))}")
    found = next((target for target in TARGETS.values() if target.serves(device)), None)
    if found is None:
        raise FusionError(f"no target serves tensors on {device}; there are {', '.join(map(repr, TARGETS))}")
    return found


def supports(target: Target, graph: SubGraph) -> str | None:
    """Why `target` cannot make one kernel of `graph`, or None if it can.

    Without layouts in ``graph.values`` only its ops are looked at.
    """

    def accept(spec: Spec) -> None:
        try:
            target.accept(spec)
        except FusionError as error:
            raise FusionError(f"the target {target.name!r} refuses it: {error}") from error

    try:
        with naming(target):
            return lowering.supports(graph, None, target.check_ops, target.lower, accept)
    except FusionError as error:
        return str(error)


class naming:  # noqa: N801
    """Turns whatever a target raises, but for FusionError, into a FusionError that names it."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, FusionError):
            raise FusionError(f"the target {self._target.name!r} raised {type(error).__name__}: {error}") from error
