"""Op definitions out of a library of ninetoothed kernels, such as ntops.

A library is a package with a module ``kernels.NAME`` for each op, whose ``premake(...)`` gives an arrangement, an
application and tensors. The arrangement is ours to choose, the application says what is computed: it is run once on
operands that write down what happens to them, which gives a scalar expression like those of the op table. So it is
inlined into whatever kernel the op becomes a part of. A tile of the application is a whole row, its loop over tiles one
step.

A definition is taken only if it agrees with the op's torch function on numbers that are hard for it: that of ntops
gives NaN for ``tanh(100)``. An op without a usable definition keeps ours; `OpLibrary.refused` says why.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import math
import textwrap
from collections.abc import Callable, Mapping
from types import FunctionType, ModuleType
from typing import Any

import torch

from graph_capture.codegen.ninetoothed.host import import_ninetoothed
from graph_capture.codegen.spec.definitions import agree, evaluate, probes
from graph_capture.codegen.spec.rows import FUNCTIONS
from graph_capture.errors import CaptureError, FusionError
from graph_capture.ir.binding import arguments, expression, prepare
from graph_capture.ir.graph import OpNode
from graph_capture.ir.ops import Kind, op
from graph_capture.ir.values import Arg
from graph_capture.log import log

_OF_A_ROW = {"num_normalized_elements": "columns"}  # an application's name for what the scalar language calls `columns`
_OF_A_KERNEL = {"ndim": 2, "num_normalized_dims": 1}  # arguments of `premake`: a row is the last dimension


class _NoDefinitionError(Exception):
    """An application cannot be written down as an expression; the message says why."""


class OpLibrary:
    """The definitions of a package.

    Args:
        package: its name: "ntops".

    Raises:
        FusionError: it cannot be imported.
    """

    def __init__(self, package: str) -> None:
        import_ninetoothed()
        try:
            importlib.import_module(f"{package}.kernels")
        except ImportError as error:
            raise FusionError(
                f"op_library={package!r}: {package} cannot be imported ({error}); install it (see the README), "
                'or leave op_library="builtin"'
            ) from error
        self.package = package
        self.refused: dict[str, str] = {}
        self._known: dict[Any, str | None] = {}

    def define(self, node: OpNode, dtype: torch.dtype) -> str | None:
        """The scalar expression of a call whose first input has this dtype: the library's, or else ours."""
        key = (node.op_type, len(node.inputs), node.attrs, dtype)
        if key not in self._known:
            try:
                self._known[key] = self._defined(node, dtype)
            except _NoDefinitionError as error:
                log.debug("%s: the definition of %s is not used: %s", self.package, node.op_type, error)
                self.refused[node.op_type] = str(error)
                self._known[key] = None
        return self._known[key] or expression(node, dtype)

    def _defined(self, node: OpNode, dtype: torch.dtype) -> str:
        if not dtype.is_floating_point or dtype is torch.float64:
            raise _NoDefinitionError(f"it is not taken for {dtype}")
        try:
            module = importlib.import_module(f"{self.package}.kernels.{node.op_type.partition('.')[0]}")
        except Exception as error:  # also whatever somebody else's module does
            raise _NoDefinitionError(f"{type(error).__name__}: {error}") from error
        given = {parameter.name: parameter.default for parameter in op(node.op_type).parameters}
        given = {name: value for name, value in given.items() if value is not inspect.Parameter.empty}
        given |= arguments(node)
        try:
            text = _trace(_application(module, given), given, op(node.op_type).parameters[0].name)
            _check(node, text)
        except _NoDefinitionError:
            raise
        except Exception as error:
            raise _NoDefinitionError(f"{type(error).__name__}: {error}") from error
        return text


def _application(module: ModuleType, given: Mapping[str, Any]) -> Callable[..., Any]:
    """The application that the library has for a call with these arguments."""
    call = {}
    for name, parameter in inspect.signature(module.premake).parameters.items():
        value = _OF_A_KERNEL.get(name, given.get(name))
        if name in _OF_A_KERNEL or name in given or parameter.default is inspect.Parameter.empty:
            call[name] = None if isinstance(value, Arg) else value
    _, application, _ = module.premake(**call)
    return application


# --- running an application on operands that write down what happens to them


class _Dtype:
    """A dtype, or the tile that has it. All floats are one: kernels compute in float32 and round at the end."""

    def __init__(self, name: str) -> None:
        self.name, self.shape = name, (1,)

    @property
    def dtype(self) -> _Dtype:
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Dtype) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)


class _Traced:
    """A value, as the text of an expression."""

    shape = (1,)  # tiles
    dtype = _Dtype("float32")

    def __init__(self, text: str) -> None:
        self.text = text

    def __getitem__(self, index: Any) -> _Traced:
        if index != 0:
            raise _NoDefinitionError("it takes parts of a tile")
        return self

    def __pow__(self, exponent: Any) -> _Traced:
        if exponent not in (2, 3):
            raise _NoDefinitionError(f"it raises to the power {exponent}")
        return _Traced(f"({' * '.join([self.text] * exponent)})")

    def __neg__(self) -> _Traced:
        return _Traced(f"(-{self.text})")

    def __invert__(self) -> _Traced:
        return _Traced(f"(~{self.text})")

    def __bool__(self) -> bool:
        raise _NoDefinitionError("it branches on a value")

    __hash__ = None  # type: ignore[assignment]


def _binary(operator: str, swapped: bool) -> Callable[[_Traced, Any], _Traced]:
    def method(self: _Traced, other: Any) -> _Traced:
        left, right = (other, self) if swapped else (self, other)
        return _Traced(f"({_text(left)} {operator} {_text(right)})")

    return method


for _name, _operator in {"add": "+", "sub": "-", "mul": "*", "truediv": "/", "and": "&", "or": "|", "xor": "^"}.items():
    setattr(_Traced, f"__{_name}__", _binary(_operator, swapped=False))
    setattr(_Traced, f"__r{_name}__", _binary(_operator, swapped=True))
for _name, _operator in {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items():
    setattr(_Traced, f"__{_name}__", _binary(_operator, swapped=False))


def _text(value: Any) -> str:
    if isinstance(value, _Traced):
        return value.text
    if not isinstance(value, (bool, int, float)):
        raise _NoDefinitionError(f"it computes with {value!r}")
    if math.isnan(value):
        return "(1e999 - 1e999)"
    return f"({value!r})".replace("inf", "1e999")


class _Output:
    """What an application assigns its result to, as a whole or tile by tile."""

    shape, dtype = _Traced.shape, _Traced.dtype
    value: Any = None

    def __setitem__(self, index: Any, value: Any) -> None:
        if index != 0:
            raise _NoDefinitionError("it writes parts of a tile")
        self.value = value


class _Language:
    """Stands for `ninetoothed.language` while an application runs."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("float", "bfloat", "int", "uint")):
            return _Dtype(name)
        if name not in (*FUNCTIONS, "where", "sum", "max", "min"):
            raise _NoDefinitionError(f"the scalar language has no function {name!r}")
        return lambda *args, **options: _call(name, args, options)

    @staticmethod
    def cast(value: Any, dtype: _Dtype) -> Any:
        if "float" not in dtype.name:
            raise _NoDefinitionError(f"it casts to {dtype.name}")
        return value

    @staticmethod
    def zeros(shape: Any, dtype: Any = None) -> Any:
        return 0.0


def _call(name: str, args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    if options.keys() - {"axis", "propagate_nan"}:
        raise _NoDefinitionError(f"it gives {', '.join(options)} to {name}")
    if not any(isinstance(arg, _Traced) for arg in args) and hasattr(math, name):
        return getattr(math, name)(*args)
    return _Traced(f"{name}({', '.join(map(_text, args))})")


def _trace(application: Callable[..., Any], given: Mapping[str, Any], first: str) -> str:
    """What an application computes of the arguments of a call, as an expression over its parameters' names.

    Raises:
        _NoDefinitionError: it cannot be written down.
    """
    parameters = list(inspect.signature(application).parameters)
    output = "output" if "output" in parameters else parameters[-1]
    operands: list[Any] = []
    for number, name in enumerate(parameters):
        if name == output:
            operands.append(_Output())
            continue
        own = first if number == 0 else name
        if own not in given and name not in _OF_A_ROW:
            raise _NoDefinitionError(f"the op has no argument {name!r}")
        value = _Traced(_OF_A_ROW[name]) if name in _OF_A_ROW else given[own]
        operands.append(_Traced(own) if isinstance(value, Arg) else value)
    # Assigning to a parameter is how an application writes; as a function it has to return what it has assigned.
    tree = ast.parse(textwrap.dedent(inspect.getsource(application)))
    (function,) = tree.body
    assert isinstance(function, ast.FunctionDef)
    function.body.append(ast.Return(ast.Name(output, ast.Load())))
    function.decorator_list, function.returns = [], None
    scope = _scope(application)
    exec(compile(ast.fix_missing_locations(tree), f"<{application.__module__}>", "exec"), scope)
    result = scope[function.name](*operands)
    result = result.value if isinstance(result, _Output) else result
    if not isinstance(result, _Traced):
        raise _NoDefinitionError("its result depends on no operand")
    return result.text


def _scope(application: Callable[..., Any]) -> dict[str, Any]:
    """An application's globals, with our stand-in for the language, also for the functions that it calls."""
    scope: dict[str, Any] = dict(application.__globals__)
    language = _Language()
    for name, value in application.__globals__.items():
        if isinstance(value, ModuleType) and value.__name__.partition(".")[0] in ("ninetoothed", "triton"):
            scope[name] = language
        elif isinstance(value, FunctionType):
            scope[name] = FunctionType(value.__code__, scope, name, value.__defaults__, value.__closure__)
    return scope | {name: lambda *args, name=name: _call(f"{name}imum", args, {}) for name in ("max", "min")}


# --- whether it is right


def _check(node: OpNode, text: str) -> None:
    """Compare an expression with the op's torch function, or where that is odd itself (gelu of inf) with ours.

    Raises:
        _NoDefinitionError: they differ.
    """
    try:
        tensors = probes(len(node.inputs), rows=op(node.op_type).kind is Kind.ROW)
        want = prepare(node)(tensors)
        names = {
            name: tensors[v.index] if isinstance(v, Arg) else v
            for name, v in ({p.name: p.default for p in op(node.op_type).parameters} | arguments(node)).items()
        }
    except (CaptureError, RuntimeError) as error:
        raise _NoDefinitionError(f"it cannot be compared: {error}") from error
    columns, ours = tensors[0].shape[-1], expression(node, torch.float32)
    got = evaluate(text, names, columns).expand(want.shape)
    wrong = ~agree(got, want)
    if ours is not None:
        wrong &= ~agree(got, evaluate(ours, names, columns).expand(want.shape))
    if wrong.any():
        at = int(wrong.reshape(-1).to(torch.int8).argmax())
        pair = got.reshape(-1)[at].item(), want.reshape(-1)[at].item()
        raise _NoDefinitionError(f"it computes {pair[0]} where torch's function gives {pair[1]}")
