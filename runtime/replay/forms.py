"""How an op is called on the hot path: by torch's own C binding, and into memory that is given.

Nothing here is believed: a binding is taken where the dispatcher is seen to get the very op that was recorded, and a
form that writes where it is told where it was tried and gave the same bits.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from graph_capture.codegen.c import library as c_library
from graph_capture.codegen.launches import Emit, Prepares, Writer
from graph_capture.ir.binding import call_of
from graph_capture.ir.graph import OpNode
from graph_capture.ir.layouts import like, once
from graph_capture.ir.numerics import Spread, same_bits
from graph_capture.ir.ops import op

LARGE = 2**20  # bytes of an input that is not copied to try a form
HUGE = 2**25  # bytes of a result that is not computed a second time beside it
RUNS = 3  # of an op that a form does not equal, to see whether it equals itself


class _Now:
    """Runs what is emitted."""

    def view(self, function: Callable[..., Any], of: Any, *arguments: Any) -> Any:
        return function(of, *arguments)

    def call(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
        function(*arguments, **keywords)

    def exists(self, *values: Any) -> bool:
        return True

    def launch(self, kernel: Prepares, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        kernel.prepare(inputs, outputs)()


class _Seen(Exception):
    pass


class _Stop(TorchDispatchMode):
    """Stops at the first op that reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.reached: tuple[Any, Sequence[Any], dict[str, Any]] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reached = (func, args, kwargs or {})
        raise _Seen


def direct(node: OpNode, inputs: Sequence[torch.Tensor]) -> Callable[..., Any] | None:
    """The C binding that calls the node's op, which is not run; None where there is none."""
    overload = op(node.op_type).overload
    if overload is None or overload.namespace != "aten":
        return None
    args, keywords = call_of(node, inputs)
    return next((f for f in _bindings(overload) if _reaches(f, overload, args, keywords)), None)


def writer(node: OpNode, inputs: Sequence[torch.Tensor], result: torch.Tensor) -> Writer | None:
    """A form that computes the node into memory with `result`'s layout, bit for bit; None where there is none."""
    called = _calling(node, inputs, result)
    if called is None:
        return None
    launched = c_library.writer(node, inputs, result)
    if launched is not None and _is_exact(launched, node, inputs, result):
        return _NativeForm(launched, called)
    return called


def _calling(node: OpNode, inputs: Sequence[torch.Tensor], result: torch.Tensor) -> Writer | None:
    """A form that calls torch from Python."""
    overload = op(node.op_type).overload
    hand = _BY_HAND.get(node.op_type)
    if hand is not None:
        form = hand(node, inputs, result)
        return form if form is not None and _is_exact(form, node, inputs, result) else None
    if overload is None or overload.namespace != "aten" or _UNSUITED.intersection(overload.tags):
        return None
    into = _out_overload(overload)
    if into is None:
        return None
    args, keywords = call_of(node, inputs)
    function = next((f for f in _bindings(overload) if _reaches(f, into, args, {**keywords, "out": result})), into)
    form = _OutForm(node, function)
    return form if _fills(form, node, inputs, result) else None


def _is_exact(form: Writer, node: OpNode, inputs: Sequence[torch.Tensor], result: torch.Tensor) -> bool:
    """Whether another way to compute the same gives the same bits; for noise too, since data may be all zeros.

    What is large and no constant is its own noise.
    """
    if not _fills(form, node, inputs, result):
        return False
    noise = [tensor if _is_varied(tensor) else _noise(tensor) for tensor in inputs]
    if all(made is tensor for made, tensor in zip(noise, inputs, strict=True)):
        return True
    expected = _called(node, noise)
    return _writes(form, node, noise, like(expected), expected)


def _called(node: OpNode, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    args, keywords = call_of(node, inputs)
    result: torch.Tensor = op(node.op_type).function(*args, **keywords)
    return result


class _NativeForm:
    """Launches where everything exists, calls elsewhere."""

    def __init__(self, launched: Writer, called: Writer) -> None:
        self._launched, self._called = launched, called

    def __call__(self, emit: Emit[Any], inputs: Sequence[Any], out: Any) -> None:
        (self._launched if emit.exists(*inputs, out) else self._called)(emit, inputs, out)


class _OutForm:
    """The ``out=`` overload of the node's own op."""

    def __init__(self, node: OpNode, function: Callable[..., Any]) -> None:
        self._function, self._node = function, node

    def __call__(self, emit: Emit[Any], inputs: Sequence[Any], out: Any) -> None:
        args, keywords = call_of(self._node, inputs)
        emit.call(self._function, *args, **keywords, out=out)


_UNSUITED = frozenset(
    {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.nondeterministic_seeded}
)


def _bindings(overload: OpOverload) -> list[Callable[..., Any]]:
    name = overload._schema.name.partition("::")[2]
    homes = (torch, torch._C._nn, torch.Tensor)
    found = (getattr(home, name, None) for home in homes)
    return [f for f in found if isinstance(f, (types.BuiltinFunctionType, types.MethodDescriptorType))]


def _reaches(function: Callable[..., Any], overload: Any, args: Sequence[Any], keywords: dict[str, Any]) -> bool:
    """Whether the call gets to the dispatcher as `overload`, with the defaults that it has."""
    stop = _Stop()
    try:
        with stop:
            function(*args, **keywords)
    except _Seen:
        pass
    except (TypeError, RuntimeError, ValueError, NotImplementedError):  # it takes other arguments
        return False
    if stop.reached is None or stop.reached[0] is not overload:
        return False
    wanted, reached = _by_name(overload, args, keywords), _by_name(overload, *stop.reached[1:])
    return all(_same(wanted[name], reached[name]) for name in wanted)


def _by_name(overload: OpOverload, args: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument of a call, those left at their default too."""
    found = {a.name: a.default_value for a in overload._schema.arguments}
    return found | {a.name: value for a, value in zip(overload._schema.arguments, args, strict=False)} | dict(keywords)


def _same(wanted: Any, reached: Any) -> bool:
    if isinstance(wanted, torch.Tensor):
        return wanted is reached
    if isinstance(wanted, (list, tuple)):
        return len(wanted) == len(reached) and all(map(_same, wanted, reached))
    if isinstance(reached, torch.Tensor):  # a number on its way to an overload that takes a tensor
        return reached.dim() == 0 and type(reached.item()) is type(wanted) and reached.item() == wanted
    return bool(wanted == reached)


def _out_overload(overload: OpOverload) -> OpOverload | None:
    """The overload with the same arguments and an `out`, if it is more than the op and a copy."""
    packet = overload.overloadpacket
    names = [(a.name, str(a.type)) for a in overload._schema.arguments]
    for name in packet.overloads():
        found = getattr(packet, name)
        rest = [a for a in found._schema.arguments if not a.is_out]
        if len(rest) + 1 != len(found._schema.arguments) or torch.Tag.generated in found.tags:
            continue
        if found._schema.arguments[-1].name == "out" and [(a.name, str(a.type)) for a in rest] == names:
            return found
    return None


def _fills(form: Writer, node: OpNode, inputs: Sequence[torch.Tensor], result: torch.Tensor) -> bool:
    """Whether the form gives what the op gave. Where that is much, it is tried on the result itself, which is computed
    again if it fails: so nothing takes more memory than the op."""
    if result.nbytes < HUGE or not result.is_contiguous() or result.dtype not in _INTEGERS:
        return _writes(form, node, inputs, like(result), result)
    wanted = _digest(result)
    try:
        form(_Now(), inputs, result)
    except (TypeError, RuntimeError, ValueError, NotImplementedError, IndexError):
        pass
    else:
        if all(map(torch.equal, _digest(result), wanted)):
            return True
    found = _called(node, inputs)
    result.copy_(found)
    if all(map(torch.equal, _digest(found), wanted)):
        return False
    return _writes(form, node, inputs, found, result)  # the op does not give the same twice


def _digest(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the bits, by rows and by columns."""
    words = tensor.view(_INTEGERS[tensor.dtype]).reshape(-1, tensor.shape[-1])
    return words.sum(0, dtype=torch.int64), words.sum(1, dtype=torch.int64)


_INTEGERS = {
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.int64: torch.int64,
    torch.int32: torch.int32,
}


def _writes(
    form: Writer, node: OpNode, inputs: Sequence[torch.Tensor], out: torch.Tensor, expected: torch.Tensor
) -> bool:
    """Whether the form fills `out`, where it is, with the bits of `expected`; or with what the op could have given as
    well, where it is seen not to give the same twice."""
    layout, address = (out.shape, out.stride()), out.data_ptr()
    try:
        form(_Now(), inputs, out)
    except (TypeError, RuntimeError, ValueError, NotImplementedError, IndexError):
        return False
    if (out.shape, out.stride()) != layout or out.data_ptr() != address:
        return False
    if same_bits(out, expected):
        return True
    if not expected.is_floating_point():
        return False
    spread = Spread(expected, copy=False)
    for _ in range(RUNS):
        spread.add(_called(node, inputs))
    return spread.noise > 0 and spread.allows(out)


def _is_varied(tensor: torch.Tensor) -> bool:
    """Whether a tensor is large, and many of its first elements differ."""
    if tensor.nbytes < LARGE or not tensor.is_floating_point():
        return False
    return tensor[tuple(slice(0, 32) for _ in tensor.shape)].float().unique().numel() > 16


def _noise(tensor: torch.Tensor) -> torch.Tensor:
    """Other values in the same layout; whether it requires grad decides how torch's matmul folds."""
    made = like(tensor)
    inner = once(made)
    generator = torch.Generator(tensor.device).manual_seed(tensor.dim())
    if tensor.is_floating_point() or tensor.is_complex():
        inner.normal_(generator=generator)
        return made.requires_grad_(tensor.requires_grad)
    inner.copy_(torch.randint(0, 2, inner.shape, generator=generator, device=tensor.device))
    return made


# --- ops whose binding has no `out`, or that have a shorter way


def _linear(node: OpNode, inputs: Sequence[torch.Tensor], result: torch.Tensor) -> Writer | None:
    if node.attr("transposed") or inputs[0].dim() < 2:
        return None
    rows = inputs[0].shape[:-1].numel()
    wide, narrow = inputs[1].shape

    def form(emit: Emit[Any], inputs: Sequence[Any], out: Any) -> None:
        x, weight, *bias = inputs
        x, out = emit.view(torch.Tensor.view, x, (rows, narrow)), emit.view(torch.Tensor.view, out, (rows, wide))
        weight = emit.view(torch.t, weight)
        if bias:
            emit.call(torch.addmm, bias[0], x, weight, out=out)
        else:
            emit.call(torch.mm, x, weight, out=out)

    return form


def _copy(node: OpNode, inputs: Sequence[torch.Tensor], result: torch.Tensor) -> Writer | None:
    def form(emit: Emit[Any], inputs: Sequence[Any], out: Any) -> None:
        emit.call(torch.Tensor.copy_, out, inputs[0])

    return form if len(inputs) == 1 and inputs[0].device == result.device else None


def _softmax(node: OpNode, inputs: Sequence[torch.Tensor], result: torch.Tensor) -> Writer | None:
    dim, dtype = node.attr("dim"), node.attr("dtype")

    def form(emit: Emit[Any], inputs: Sequence[Any], out: Any) -> None:
        emit.call(torch.softmax, inputs[0], dim, dtype, out=out)

    return form


def _matmul(node: OpNode, inputs: Sequence[torch.Tensor], result: torch.Tensor) -> Writer | None:
    if 1 in (tensor.dim() for tensor in inputs):  # torch resizes `out` there and back, with a warning
        return None

    def form(emit: Emit[Any], inputs: Sequence[Any], out: Any) -> None:
        emit.call(torch.matmul, *inputs, out=out)

    return form


def _embedding(node: OpNode, inputs: Sequence[torch.Tensor], result: torch.Tensor) -> Writer | None:
    rows, width = inputs[1].numel(), inputs[0].shape[-1]

    def form(emit: Emit[Any], inputs: Sequence[Any], out: Any) -> None:
        rows_at = emit.view(torch.Tensor.view, inputs[1], (rows,))
        emit.call(torch.index_select, inputs[0], 0, rows_at, out=emit.view(torch.Tensor.view, out, (rows, width)))

    return form


def _arange(node: OpNode, inputs: Sequence[torch.Tensor], result: torch.Tensor) -> Writer | None:
    start, end, step = node.attr("start", 0), node.attr("end"), node.attr("step", 1)

    def form(emit: Emit[Any], inputs: Sequence[Any], out: Any) -> None:
        emit.call(torch.arange, start, end, step, out=out)

    return form


_BY_HAND: dict[str, Callable[[OpNode, Sequence[torch.Tensor], torch.Tensor], Writer | None]] = {
    "linear": _linear,
    "matmul": _matmul,
    "softmax": _softmax,
    "embedding": _embedding,
    "cast": _copy,
    "aten.clone.default": _copy,
    "aten.arange.default": _arange,
    "aten.arange.start": _arange,
    "aten.arange.start_step": _arange,
}
