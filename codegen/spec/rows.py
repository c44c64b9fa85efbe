"""Pointwise ops and row reductions as one kernel, before any target.

Expressions come from the op table as Python text; here they are parsed, typed, and flattened into three-address form
with equal subexpressions computed once. Floating-point arithmetic is in float32 (float64 if a float64 takes part), and
rounds where a value leaves the region, or where the code could tell (see `rounding`).
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from graph_capture.codegen.spec import rounding
from graph_capture.codegen.spec.geometry import Geometry, Sizes, arrange, dense_strides, order_of
from graph_capture.codegen.spec.kernel import INDEX, REDUCTIONS, KernelSpec, Operand, Statement
from graph_capture.errors import FusionError
from graph_capture.ir.binding import arguments, expression
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.ops import Kind, op
from graph_capture.ir.values import Arg, TensorMeta

Definitions = Callable[[OpNode, torch.dtype], "str | None"]  # see `graph_capture.ir.ops.expression`
COMPARISONS = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
BITWISE = {ast.BitAnd: "&", ast.BitOr: "|", ast.BitXor: "^"}
FUNCTIONS = (
    "exp",
    "log",
    "log1p",
    "power",
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
_OF_BOOLS = {"+": "|", "maximum": "|", "*": "&", "minimum": "&"}  # arithmetic that torch lets bools take part in
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


def claims(graph: SubGraph) -> bool:
    """Every region that no other lowering claims is tried as this."""
    return True


def lower(graph: SubGraph, values: Mapping[str, TensorMeta], define: Definitions = expression) -> KernelSpec:
    """`graph` as one kernel, given the layout of each of its values, and the scalar expressions of its ops.

    Raises:
        FusionError: it cannot be one kernel; the message says why.
    """
    if not graph.nodes:
        raise FusionError("the region is empty")
    check_ops(graph)
    devices = {values[name].device for name in graph.input_names}
    if len(devices) > 1:
        raise FusionError(f"its inputs are on several devices: {', '.join(sorted(map(str, devices)))}")
    for name in (*graph.input_names, *(n for node in graph.nodes for n in node.outputs)):
        if values[name].dtype not in DTYPES:
            raise FusionError(f"{values[name].dtype} is not supported")
    builder = _Builder(graph, values, _iteration_space(graph, values), define)
    for node in graph.nodes:
        builder.add(node)
    return builder.spec()


def check_ops(graph: SubGraph) -> None:
    """Look at the ops alone.

    Raises:
        FusionError: one of them is of another kind.
    """
    for node in graph.nodes:
        if op(node.op_type).kind not in (Kind.POINTWISE, Kind.ROW):
            raise FusionError(f"{node.op_type} is not a pointwise or row op")


def _iteration_space(graph: SubGraph, values: Mapping[str, TensorMeta]) -> tuple[int, ...]:
    shapes = [values[name].shape for name in graph.input_names]
    shapes += [
        values[name].shape for node in graph.nodes if op(node.op_type).kind is Kind.POINTWISE for name in node.outputs
    ]
    try:
        space = tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError as error:
        raise FusionError("its values do not broadcast to one shape") from error
    return space


class _Builder:
    def __init__(
        self, graph: SubGraph, values: Mapping[str, TensorMeta], space: tuple[int, ...], define: Definitions
    ) -> None:
        self.graph, self.values, self.space, self.define = graph, values, space, define
        self.made: dict[str, Statement] = {}  # by their targets, in order
        self.variables: dict[str, str] = {}  # value -> variable that holds it
        self.dtypes: dict[str, torch.dtype] = {}  # variable -> dtype it is computed in
        self._known: dict[tuple[Any, ...], str] = {}
        wide = any(meta.dtype is torch.float64 for meta in values.values())
        self.float = torch.float64 if wide else torch.float32
        self.shown = rounding.shown(graph, values, self.float)
        for name in graph.input_names:
            self.dtypes[name] = values[name].dtype
            self.variables[name] = name

    def _computed(self, dtype: torch.dtype) -> torch.dtype:
        return self.float if dtype.is_floating_point else dtype

    # --- ops

    def add(self, node: OpNode) -> None:
        """Append the statements of one op."""
        first = self.values[node.inputs[0]] if node.inputs else None
        if first is None or len(node.outputs) != 1:
            raise FusionError(f"{node.op_type} has no tensor input, or several outputs")
        text = self.define(node, first.dtype)
        if text is None:
            raise FusionError(f"this call of {node.op_type} has no scalar expression")
        bound = arguments(node)
        out = self.values[node.outputs[0]]
        row = op(node.op_type).kind is Kind.ROW
        if row:
            self._check_row(node, bound, first, out)
        common = first.dtype if row else self._common_dtype(node, out)
        compares = out.dtype is torch.bool and common.is_floating_point
        scope: dict[str, Any] = {}
        for name, value in bound.items():
            if isinstance(value, Arg):
                value = self.variables[node.inputs[value.index]]
            scope[name] = self.rounded(value, common) if compares else value
        scope.setdefault("columns", self.space[-1] if self.space else 1)
        result = _Parser(self, scope, self._computed(common)).visit(ast.parse(text, mode="eval").body)
        result = self.cast(result, self._computed(out.dtype))
        if node.outputs[0] in self.shown:
            result = self.rounded(result, out.dtype)
        self.variables[node.outputs[0]] = result

    def _check_row(self, node: OpNode, bound: Mapping[str, Any], first: TensorMeta, out: TensorMeta) -> None:
        dims = bound.get("dim", -1)
        dims = dims if isinstance(dims, tuple) else (dims,)
        rank = len(first.shape)
        if [dim % rank if rank else 0 for dim in dims if dim is not None] != [rank - 1] or not rank:
            raise FusionError(f"{node.op_type} is not over the last dimension alone")
        if not first.dtype.is_floating_point:
            raise FusionError(f"{node.op_type} of {first.dtype} is not supported")
        if tuple(first.shape) != self.space:
            raise FusionError(f"{node.op_type} reduces {list(first.shape)}, not the region's {list(self.space)}")
        name = node.outputs[0]
        if len(out.shape) < rank and name in self.graph.users:
            raise FusionError(f"{node.op_type} drops its dimension and is used inside")

    def _common_dtype(self, node: OpNode, out: TensorMeta) -> torch.dtype:
        """The dtype that operands are brought to: the result's, or for a comparison their common one."""
        if out.dtype is not torch.bool:
            return out.dtype
        probes = [
            torch.empty(self.values[name].shape, dtype=self.values[name].dtype, device="meta") for name in node.inputs
        ]
        scalars = [value for _, value in node.attrs if isinstance(value, (bool, int, float))]
        operands = [*probes, *scalars]
        if len(operands) == 2:
            return torch.result_type(probes[0], operands[1])
        dtype = probes[0].dtype
        for operand in operands[1:]:
            dtype = torch.promote_types(dtype, torch.result_type(probes[0], operand))
        return dtype

    # --- statements

    def emit(self, function: str, args: tuple[Any, ...], dtype: torch.dtype) -> str:
        """The variable that holds ``function(args)``, computed at most once."""
        if dtype is torch.bool:
            function = _OF_BOOLS.get(function, function)
        key = (function, *((type(a), a) for a in args), dtype)
        if key not in self._known:
            target = f"%{len(self._known)}"  # no operand is called so
            self._known[key] = target
            self.dtypes[target] = dtype
            self.made[target] = Statement(target, function, args, dtype)
        return self._known[key]

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        """`value` (a variable or a number) in `dtype`."""
        if not isinstance(value, str):
            return rounding.number(value, dtype)
        if self.dtypes[value] is dtype:
            return value
        if dtype is torch.bool:
            if not self.dtypes[value].is_floating_point:
                return self.emit("!=", (value, 0), torch.bool)
            return self.emit("!=", (self.cast(value, self.float), 0.0), torch.bool)
        return self.emit("cast", (value,), dtype)

    def rounded(self, value: Any, dtype: torch.dtype) -> Any:
        """`value` (a variable or a number) as memory of `dtype` would hold it."""
        if not dtype.is_floating_point or dtype is self.float or self._fits(value, dtype):
            return value
        if not isinstance(value, str):
            return rounding.rounded(value, dtype)
        return self.emit(rounding.ROUNDINGS[dtype], (self.cast(value, self.float),), self.float)

    def _fits(self, value: Any, dtype: torch.dtype) -> bool:
        """Whether `value` is known to be one of a floating-point dtype."""
        if not isinstance(value, str):
            return not isinstance(value, (int, float)) or rounding.rounded(value, dtype) == value
        made = self.made.get(value)
        if made is None:
            return rounding.embeds(self.dtypes[value], dtype)
        if made.function in rounding.ROUNDED:
            return rounding.embeds(rounding.ROUNDED[made.function], dtype)
        if made.function == "cast":
            return self._fits(made.arguments[0], dtype)
        arguments = made.arguments[1:] if made.function == "where" else made.arguments
        return made.function in rounding.SELECTIONS and all(self._fits(argument, dtype) for argument in arguments)

    def _stored(self, name: str) -> Any:
        """What an output is stored from: it is rounded there anyway."""
        variable = self.variables[name]
        made = self.made.get(variable) if isinstance(variable, str) else None
        if made is not None and rounding.ROUNDED.get(made.function) is self.values[name].dtype:
            return made.arguments[0]
        return variable

    def spec(self) -> KernelSpec:
        """The finished description."""
        names = (*self.graph.input_names, *self.graph.output_names)
        stores = []
        for name in self.graph.output_names:
            if name in self.graph.input_names:
                raise FusionError(f"output {name} is an input")
            stores.append(self._stored(name))
            if not isinstance(stores[-1], str):
                raise FusionError(f"output {name} is a constant")
        statements = _used(self.made.values(), stores)
        reduces = any(statement.function in REDUCTIONS for statement in statements)
        metas = [self.values[name] for name in names]
        shapes, strides = [meta.shape for meta in metas], [meta.stride for meta in metas]
        for index in range(len(self.graph.input_names), len(names)):
            shapes[index], strides[index] = self._filled(shapes[index], strides[index])
        found = arrange(self.space, shapes, strides, flat=not reduces, rows=reduces)
        flat = len(found.sizes) == 1 and not reduces and all(steps[0] in (0, 1) for steps in found.strides)
        if not flat:
            found = arrange(self.space, shapes, strides, flat=False, rows=reduces).padded(2)
        operands = [self._operand(index, found, shapes[index], strides[index]) for index in range(len(names))]
        inputs = len(self.graph.input_names)
        return KernelSpec(
            tuple(operands[:inputs]),
            tuple(operands[inputs:]),
            None if flat else found.sizes[-1],
            tuple(statements),
            tuple(stores),
        )

    def _filled(self, shape: Sizes, stride: Sizes) -> tuple[Sizes, Sizes]:
        """The shape of an output, with the dimension that a reduction dropped, and the strides that it will have."""
        stride = dense_strides(shape, order_of(shape, stride))
        if len(shape) < len(self.space):
            shape, stride = (*shape, 1), (*stride, 0)
        if shape not in (self.space, (*self.space[:-1], 1)):
            raise FusionError(f"an output of shape {list(shape)} does not fill {list(self.space)}")
        return shape, stride

    def _operand(self, index: int, found: Geometry, shape: Sizes, stride: Sizes) -> Operand:
        names = (*self.graph.input_names, *self.graph.output_names)
        steps, output = found.strides[index], index >= len(self.graph.input_names)
        keepdim = not output or len(self.values[names[index]].shape) == len(self.space)
        whole = output or len(shape) == len(self.space)  # what does not move along a single row might along several
        over = [step != 0 or (size == 1 and whole) for step, size in zip(steps, found.sizes, strict=True)]
        if output:
            over = [True] * (len(over) - 1) + [keepdim and shape == self.space]
        return Operand(
            names[index],
            self.values[names[index]].dtype,
            tuple(over),
            unit=steps[-1] in (0, 1) or found.sizes[-1] == 1,
            keepdim=keepdim,
            order=order_of(shape, stride) if output and keepdim else (),
        )


def _used(statements: Iterable[Statement], stores: Iterable[str]) -> list[Statement]:
    """Those whose results are stored, or used on the way there."""
    wanted, found = set(stores), []
    for statement in reversed([*statements]):
        if statement.target in wanted:
            wanted.update(a for a in statement.arguments if isinstance(a, str))
            found.append(statement)
    return found[::-1]


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
        if isinstance(node.op, ast.Invert):
            value = self._value(node.operand)
            if self.dtype is torch.bool:
                return self._emit("==", value, False)
            return self._emit("~", value)
        return self._emit("neg", self._value(node.operand))

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        if type(node.op) in BITWISE:
            left, right = self.visit(node.left), self.visit(node.right)
            logical = {self.builder.dtypes[v] for v in (left, right) if isinstance(v, str)} == {torch.bool}
            dtype = torch.bool if logical else self.dtype
            operands = self.builder.cast(left, dtype), self.builder.cast(right, dtype)
            return self.builder.emit(BITWISE[type(node.op)], operands, dtype)
        return self._emit(OPERATORS[type(node.op)], self._value(node.left), self._value(node.right))

    def visit_Compare(self, node: ast.Compare) -> Any:
        operator = COMPARISONS[type(node.ops[0])]
        return self.builder.emit(operator, (self._value(node.left), self._value(node.comparators[0])), torch.bool)

    def visit_Call(self, node: ast.Call) -> Any:
        name = node.func.id  # type: ignore[attr-defined]
        if name == "where":
            condition = self.builder.cast(self.visit(node.args[0]), torch.bool)
            return self._emit("where", condition, self._value(node.args[1]), self._value(node.args[2]))
        if name == INDEX:
            return self.builder.emit(INDEX, (), torch.float32)
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
