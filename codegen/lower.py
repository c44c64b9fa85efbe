"""A region as one kernel, before any target: the iteration space, the operands' layouts, a list of scalar statements.

Expressions come from the op table as Python text; here they are parsed, typed, and flattened into three-address form
with equal subexpressions computed once. Floating-point arithmetic is in float32 (float64 if a float64 takes part), and
rounds once where a value leaves the region.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import pairwise
from typing import Any

import torch

from graph_capture.errors import FusionError
from graph_capture.graph import Arg, OpNode, SubGraph, TensorMeta
from graph_capture.ops import Kind, arguments, expression, flatten_outputs, op, prepare

MAX_ROW = 65536  # elements of the longest row that is reduced in one block
MAX_ELEMENTS = 2**31 - 1  # offsets are 32-bit
REDUCTIONS = ("sum", "mean", "max", "min")
COMPARISONS = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
FUNCTIONS = (
    "exp",
    "log",
    "sqrt",
    "rsqrt",
    "sin",
    "cos",
    "tanh",
    "erf",
    "sigmoid",
    "abs",
    "floor",
    "maximum",
    "minimum",
)
DTYPES = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    }
)


class Layout(Enum):
    """How an operand lies over the iteration space of rows x columns."""

    FULL = "full"  # an element for each point
    ROW = "row"  # one row, the same for all
    COLUMN = "column"  # one element for each row
    SCALAR = "scalar"  # one element


@dataclass(frozen=True)
class Operand:
    """A tensor that the kernel reads or writes. `keepdim` is False for a column that lacks its last dimension."""

    name: str
    dtype: torch.dtype
    layout: Layout
    keepdim: bool = True


@dataclass(frozen=True)
class Statement:
    """``target = function(arguments)``; an argument is the name of a variable or a number."""

    target: str
    function: str
    arguments: tuple[Any, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class KernelSpec:
    """What a target prints.

    `columns` is the static size of a row, or None for a flat kernel: all operands equal in shape, or scalars.
    `stores` gives the variable that each output holds at the end.
    """

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    columns: int | None
    statements: tuple[Statement, ...]
    stores: tuple[str, ...]

    @property
    def reduces(self) -> bool:
        """Whether a row is reduced."""
        return any(statement.function in REDUCTIONS for statement in self.statements)


def infer_values(graph: SubGraph, inputs: Mapping[str, TensorMeta]) -> dict[str, TensorMeta]:
    """The layout of every value of `graph`, found by running its ops on meta tensors.

    Raises:
        FusionError: an op does not accept its inputs.
    """
    env: dict[str, torch.Tensor] = {}
    for name, meta in inputs.items():
        env[name] = torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device="meta")
    device = next((meta.device for meta in inputs.values()), torch.device("cpu"))
    for node in graph.nodes:
        try:
            results = flatten_outputs(prepare(node)([env[name] for name in node.inputs]))
        except Exception as error:
            raise FusionError(f"{node.op_type} does not accept its inputs: {error}") from error
        env.update(zip(node.outputs, results, strict=True))
    return {name: TensorMeta.of(tensor)._replace(device=device) for name, tensor in env.items()}


def supports(graph: SubGraph, metas: Mapping[str, TensorMeta] | None = None) -> str | None:
    """Why `graph` cannot be one kernel, or None if it can. Without layouts (here or in ``graph.values``) only its ops
    are looked at."""
    try:
        for node in graph.nodes:
            _check_op(node)
        known = dict(graph.values) | dict(metas or {})
        if all(name in known for name in graph.input_names):
            if not all(name in known for node in graph.nodes for name in node.outputs):
                known = infer_values(graph, {name: known[name] for name in graph.input_names})
            _lower(graph, known)
    except FusionError as error:
        return str(error)
    return None


def lower(graph: SubGraph, inputs: Mapping[str, TensorMeta]) -> KernelSpec:
    """`graph` on inputs of these layouts as one kernel.

    Raises:
        FusionError: it cannot be one kernel; the message says why.
    """
    for node in graph.nodes:
        _check_op(node)
    return _lower(graph, infer_values(graph, inputs))


def _check_op(node: OpNode) -> None:
    if op(node.op_type).kind not in (Kind.POINTWISE, Kind.ROW):
        raise FusionError(f"{node.op_type} is not a pointwise or row op")


def _lower(graph: SubGraph, values: Mapping[str, TensorMeta]) -> KernelSpec:
    if not graph.nodes:
        raise FusionError("the region is empty")
    devices = {values[name].device for name in graph.input_names}
    if len(devices) > 1:
        raise FusionError(f"its inputs are on several devices: {', '.join(sorted(map(str, devices)))}")
    for name in (*graph.input_names, *(n for node in graph.nodes for n in node.outputs)):
        if values[name].dtype not in DTYPES:
            raise FusionError(f"{values[name].dtype} is not supported")
    space = _iteration_space(graph, values)
    builder = _Builder(graph, values, space)
    for node in graph.nodes:
        builder.add(node)
    return builder.spec()


def _iteration_space(graph: SubGraph, values: Mapping[str, TensorMeta]) -> tuple[int, ...]:
    shapes = [values[name].shape for name in graph.input_names]
    shapes += [
        values[name].shape for node in graph.nodes if op(node.op_type).kind is Kind.POINTWISE for name in node.outputs
    ]
    try:
        space = tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError as error:
        raise FusionError("its values do not broadcast to one shape") from error
    if math.prod(space) > MAX_ELEMENTS:
        raise FusionError(f"{math.prod(space)} elements need 64-bit offsets")
    return space


def layout_of(shape: Sequence[int], space: Sequence[int]) -> Layout | None:
    """How `shape` broadcasts over `space`, or None where it is neither full, a row, a column nor a scalar."""
    padded = (1,) * (len(space) - len(shape)) + tuple(shape)
    if math.prod(shape) == 1 and (len(shape) < len(space) or math.prod(space) != 1):
        return Layout.SCALAR
    leading = all(size == 1 for size in padded[:-1])
    if space and leading and padded[-1] == space[-1] and (len(shape) < len(space) or math.prod(space[:-1]) != 1):
        return Layout.ROW
    if padded == tuple(space):
        return Layout.FULL
    if padded[:-1] == tuple(space[:-1]) and padded[-1] == 1:
        return Layout.COLUMN
    return None


def _in_one_sweep(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether these dimensions can be one, without a copy."""
    dims = [(size, step) for size, step in zip(shape, stride, strict=True) if size != 1]
    return all(outer == inner * size for (_, outer), (size, inner) in pairwise(dims))


class _Builder:
    def __init__(self, graph: SubGraph, values: Mapping[str, TensorMeta], space: tuple[int, ...]) -> None:
        self.graph, self.values, self.space = graph, values, space
        self.statements: list[Statement] = []
        self.variables: dict[str, str] = {}  # value -> variable that holds it
        self.dtypes: dict[str, torch.dtype] = {}  # variable -> dtype it is computed in
        self._known: dict[tuple[Any, ...], str] = {}
        wide = any(meta.dtype is torch.float64 for meta in values.values())
        self.float = torch.float64 if wide else torch.float32
        self.inputs = tuple(self._operand(name) for name in graph.input_names)
        for operand in self.inputs:
            self.dtypes[operand.name] = operand.dtype
            self.variables[operand.name] = operand.name

    def _operand(self, name: str) -> Operand:
        meta = self.values[name]
        layout = layout_of(meta.shape, self.space)
        if layout is None:
            raise FusionError(f"{list(meta.shape)} broadcasts over {list(self.space)} in more than rows and columns")
        return Operand(name, meta.dtype, layout)

    def _computed(self, dtype: torch.dtype) -> torch.dtype:
        return self.float if dtype.is_floating_point else dtype

    def _lies_in_rows(self, operand: Operand) -> bool:
        """Whether its rows can be read in place but not its elements in one sweep: a half of a merged projection."""
        meta = self.values[operand.name]
        if operand.layout is not Layout.FULL or len(meta.stride) != len(meta.shape):
            return False
        return not _in_one_sweep(meta.shape, meta.stride) and _in_one_sweep(meta.shape[:-1], meta.stride[:-1])

    # --- ops

    def add(self, node: OpNode) -> None:
        """Append the statements of one op."""
        first = self.values[node.inputs[0]] if node.inputs else None
        if first is None or len(node.outputs) != 1:
            raise FusionError(f"{node.op_type} has no tensor input, or several outputs")
        text = expression(node, first.dtype)
        if text is None:
            raise FusionError(f"this call of {node.op_type} has no scalar expression")
        bound = arguments(node)
        out = self.values[node.outputs[0]]
        if op(node.op_type).kind is Kind.ROW:
            self._check_row(node, bound, first, out)
        scope: dict[str, Any] = {
            name: self.variables[node.inputs[value.index]] if isinstance(value, Arg) else value
            for name, value in bound.items()
        }
        working = self._working_dtype(node, out)
        result = _Parser(self, scope, working).visit(ast.parse(text, mode="eval").body)
        self.variables[node.outputs[0]] = self.cast(result, self._computed(out.dtype))

    def _check_row(self, node: OpNode, bound: Mapping[str, Any], first: TensorMeta, out: TensorMeta) -> None:
        dims = bound.get("dim", -1)
        dims = dims if isinstance(dims, tuple) else (dims,)
        rank = len(first.shape)
        if [dim % rank if rank else 0 for dim in dims if dim is not None] != [rank - 1] or not rank:
            raise FusionError(f"{node.op_type} is not over the last dimension alone")
        if not first.dtype.is_floating_point or not out.dtype.is_floating_point:
            raise FusionError(f"{node.op_type} of {first.dtype} is not supported")
        if tuple(first.shape) != self.space:
            raise FusionError(f"{node.op_type} reduces {list(first.shape)}, not the region's {list(self.space)}")
        if first.shape[-1] > MAX_ROW:
            raise FusionError(f"a row of {first.shape[-1]} elements is longer than {MAX_ROW}")
        name = node.outputs[0]
        if len(out.shape) < rank and name in self.graph.users:
            raise FusionError(f"{node.op_type} drops its dimension and is used inside")

    def _working_dtype(self, node: OpNode, out: TensorMeta) -> torch.dtype:
        """The dtype that operands are brought to: the result's, or for a comparison their common one."""
        if out.dtype is not torch.bool:
            return self._computed(out.dtype)
        probes = [
            torch.empty(self.values[name].shape, dtype=self.values[name].dtype, device="meta") for name in node.inputs
        ]
        scalars = [value for _, value in node.attrs if isinstance(value, (bool, int, float))]
        operands = [*probes, *scalars]
        dtype = probes[0].dtype
        for operand in operands[1:]:
            dtype = torch.promote_types(dtype, torch.result_type(probes[0], operand))
        return self._computed(dtype)

    # --- statements

    def emit(self, function: str, args: tuple[Any, ...], dtype: torch.dtype) -> str:
        """The variable that holds ``function(args)``, computed at most once."""
        key = (function, *((type(a), a) for a in args), dtype)
        if key not in self._known:
            target = f"%{len(self._known)}"  # no operand is called so
            self._known[key] = target
            self.dtypes[target] = dtype
            self.statements.append(Statement(target, function, args, dtype))
        return self._known[key]

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        """`value` (a variable or a number) in `dtype`."""
        if not isinstance(value, str):
            return bool(value) if dtype is torch.bool else float(value) if dtype.is_floating_point else int(value)
        if self.dtypes[value] is dtype:
            return value
        if dtype is torch.bool:
            return self.emit("!=", (value, 0.0 if self.dtypes[value].is_floating_point else 0), torch.bool)
        return self.emit("cast", (value,), dtype)

    def spec(self) -> KernelSpec:
        """The finished description."""
        outputs, stores = [], []
        for name in self.graph.output_names:
            if name in self.graph.input_names:
                raise FusionError(f"output {name} is an input")
            meta = self.values[name]
            keepdim = len(meta.shape) == len(self.space)
            shape = meta.shape if keepdim else (*meta.shape, 1)
            layout = layout_of(shape, self.space)
            if layout is Layout.SCALAR and self.space and math.prod(self.space[:-1]) == 1:
                layout = Layout.COLUMN
            if layout not in (Layout.FULL, Layout.COLUMN):
                raise FusionError(f"an output of shape {list(meta.shape)} does not fill {list(self.space)}")
            outputs.append(Operand(name, meta.dtype, layout, keepdim))
            stores.append(self.variables[name])
            if not isinstance(stores[-1], str):
                raise FusionError(f"output {name} is a constant")
        flat = all(o.layout in (Layout.FULL, Layout.SCALAR) for o in self.inputs) and all(
            o.layout is Layout.FULL for o in outputs
        )
        spec = KernelSpec(self.inputs, tuple(outputs), None, tuple(self.statements), tuple(stores))
        if not flat or spec.reduces or any(map(self._lies_in_rows, self.inputs)):
            spec = replace(spec, columns=self.space[-1])
        return spec


class _Parser(ast.NodeVisitor):
    """One expression of the op table -> statements; returns variables or numbers."""

    def __init__(self, builder: _Builder, scope: Mapping[str, Any], dtype: torch.dtype) -> None:
        self.builder, self.scope, self.dtype = builder, scope, dtype

    def _value(self, node: ast.expr) -> Any:
        return self.builder.cast(self.visit(node), self.dtype)

    def _emit(self, function: str, *args: Any) -> Any:
        return self.builder.emit(function, args, self.dtype)

    def visit_Name(self, node: ast.Name) -> Any:
        return self.scope[node.id]

    def visit_Constant(self, node: ast.Constant) -> Any:
        return node.value

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Any:
        return self._emit("neg", self._value(node.operand))

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        return self._emit(OPERATORS[type(node.op)], self._value(node.left), self._value(node.right))

    def visit_Compare(self, node: ast.Compare) -> Any:
        operator = COMPARISONS[type(node.ops[0])]
        return self.builder.emit(operator, (self._value(node.left), self._value(node.comparators[0])), torch.bool)

    def visit_Call(self, node: ast.Call) -> Any:
        name = node.func.id  # type: ignore[attr-defined]
        if name == "where":
            condition = self.builder.cast(self.visit(node.args[0]), torch.bool)
            return self._emit("where", condition, self._value(node.args[1]), self._value(node.args[2]))
        args = [self._value(arg) for arg in node.args]
        if name == "sigmoid":
            exponential = self._emit("exp", self._emit("neg", args[0]))
            return self._emit("/", self.builder.cast(1, self.dtype), self._emit("+", exponential, 1.0))
        if name not in FUNCTIONS and name not in REDUCTIONS:
            raise FusionError(f"the scalar language has no function {name!r}")
        if name == "floor" and not self.dtype.is_floating_point:
            return args[0]
        return self._emit(name, *args)

    def generic_visit(self, node: ast.AST) -> Any:
        raise FusionError(f"the scalar language has no {type(node).__name__}")
