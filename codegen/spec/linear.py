"""A linear and the pointwise ops behind it as one kernel, before any target.

With few rows the time of a linear is that of reading its weight. What follows it element by element is computed before
the result leaves the kernel. Several linears of one input, or parts of one linear's result (gate and up), are several
*products* of one kernel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from graph_capture.codegen.spec import rows
from graph_capture.codegen.spec.kernel import Operand, Statement
from graph_capture.errors import FusionError
from graph_capture.ir.binding import arguments, expression
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.ops import LINEARS, Kind, op
from graph_capture.ir.quantised import format_of
from graph_capture.ir.values import Arg, TensorMeta

MAX_ROWS = 8  # for which there are kernels of their own, on each target
MANY_ROWS = 256  # up to which tensor cores were measured to gain by what they compute besides, on an H100
ALONE_ROWS = 16  # and by the product alone
PACKED_ROWS = 16  # for which a packed weight is decoded as it is read
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Product:
    """``target = x @ weight[start : start + N].T + bias[start : start + N]``, [rows, N], summed in float32.

    Attributes:
        target: the variable that holds it in the epilogue.
        weight, bias: names of inputs; no bias if empty.
        start: the first row of the weight that belongs to it.
        transposed: whether the weight is given as [K, all N] rather than [all N, K].
        unit: whether the weight's elements lie next to each other along K (rather than along N) in memory.
        scheme: the format of a packed weight, [all N, bytes of a row]; empty for any other.
    """

    target: str
    weight: str
    bias: str
    start: int
    transposed: bool
    unit: bool
    scheme: str = ""

    def width(self, inner: int) -> int:
        """Elements of a row of the weight, for K."""
        return format_of(self.scheme).row_bytes(inner) if self.scheme else inner


@dataclass(frozen=True)
class LinearSpec:
    """Products of rows with weights, and scalar statements over their elements.

    Attributes:
        inputs, outputs: in the region's order. Those that statements name move along ``over`` = (rows, columns).
        x: the name of the input that is multiplied, [..., K].
        rows: M; None where it is more than `MAX_ROWS` (packed: `PACKED_ROWS`), and known at launch.
        inner, columns: K and N; static.
        products: what is multiplied, [M, N] each.
        statements: the epilogue, over the products' targets and the inputs' names.
        stores: the variable that each output holds.
    """

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    x: str
    rows: int | None
    inner: int
    columns: int
    products: tuple[Product, ...]
    statements: tuple[Statement, ...]
    stores: tuple[str, ...]

    @property
    def few(self) -> int:
        """`rows`, of a kernel for few of them.

        Raises:
            FusionError: it is for many.
        """
        if self.rows is None:
            raise FusionError(f"it has more than {MAX_ROWS} rows")
        return self.rows

    @property
    def extras(self) -> tuple[Operand, ...]:
        """The inputs that the epilogue reads."""
        read = {a for statement in self.statements for a in statement.arguments if isinstance(a, str)}
        return tuple(operand for operand in self.inputs if operand.name in read | set(self.stores))

    @property
    def dtype(self) -> torch.dtype:
        """Of the input that is multiplied, and of the weights."""
        return next(operand.dtype for operand in self.inputs if operand.name == self.x)

    def allocate(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Contiguous outputs for a call on `inputs`.

        Raises:
            FusionError: the shapes do not fit the kernel.
        """
        x = self._named(inputs)[self.x]
        shape = (*x.shape[:-1], self.columns)
        return [torch.empty(shape, dtype=operand.dtype, device=x.device) for operand in self.outputs]

    def matrices(self, tensors: Sequence[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
        """The tensors of a call (inputs, then outputs) as the kernel sees them, all of them views.

        Returns:
            ``x``: [M, K]; ``weights``: [N, K] for each product; ``biases``: [N] for each product that has one;
            ``extras``: [M or 1, N or 1]; ``outputs``: [M, N].

        Raises:
            FusionError: a tensor has another shape, or strides of which no view can be made.
        """
        given = self._named(tensors[: len(self.inputs)])
        x = given[self.x]
        space = (*x.shape[:-1], self.columns)
        count = math.prod(x.shape[:-1])
        fits = count == self.rows if self.rows is not None else count > MAX_ROWS
        if x.shape[-1:] != (self.inner,) or not fits:
            rows = self.rows or f"more than {MAX_ROWS}"
            raise FusionError(f"{self.x} is {list(x.shape)}, not {rows} rows of {self.inner}")
        weights, biases = [], []
        for product in self.products:
            weight = given[product.weight].t() if product.transposed else given[product.weight]
            part = slice(product.start, product.start + self.columns)
            if weight.shape[1:] != (product.width(self.inner),) or weight[part].shape[0] != self.columns:
                raise FusionError(f"{product.weight} is {list(given[product.weight].shape)}, which does not fit")
            if weight.stride(1 if product.unit else 0) != 1 and weight.shape[1 if product.unit else 0] != 1:
                raise FusionError(f"{product.weight} lies in another way than the kernel's")
            weights.append(weight[part])
            if product.bias:
                if given[product.bias].shape != weight.shape[:1]:  # torch broadcasts it
                    raise FusionError(
                        f"{product.bias} is {list(given[product.bias].shape)}, not {weight.shape[0]} columns"
                    )
                biases.append(given[product.bias][part])
        extras = [_as_matrix(given[operand.name], space, operand.over) for operand in self.extras]
        outputs = []
        for operand, tensor in zip(self.outputs, tensors[len(self.inputs) :], strict=True):
            if tensor.shape != space:
                raise FusionError(f"{operand.name} is {list(tensor.shape)}, expected {list(space)}")
            outputs.append(_as_matrix(tensor, space, operand.over))
        return {"x": [_rows_of(x)], "weights": weights, "biases": biases, "extras": extras, "outputs": outputs}

    def _named(self, inputs: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {operand.name: tensor for operand, tensor in zip(self.inputs, inputs, strict=True)}


def _rows_of(tensor: torch.Tensor) -> torch.Tensor:
    try:
        return tensor.view(-1, tensor.shape[-1])
    except RuntimeError as error:
        raise FusionError(f"{list(tensor.shape)} with strides {tensor.stride()} cannot be seen as rows") from error


def _as_matrix(tensor: torch.Tensor, space: Sequence[int], over: Sequence[bool]) -> torch.Tensor:
    """`tensor` as [M or 1, N or 1], by whether it moves `over` rows and columns."""
    tensor = tensor[(None,) * (len(space) - tensor.dim())] if tensor.dim() < len(space) else tensor
    want = [size if moves else 1 for size, moves in zip(space, (*[over[0]] * (len(space) - 1), over[1]), strict=True)]
    if list(tensor.shape) != want:
        raise FusionError(f"an operand is {list(tensor.shape)}, expected {want}")
    return _rows_of(tensor)


# --- from a region


def claims(graph: SubGraph) -> bool:
    """Whether this lowering is for `graph`: it multiplies."""
    return any(node.op_type in LINEARS for node in graph.nodes)


def check_ops(graph: SubGraph) -> None:
    """Look at the ops alone.

    Raises:
        FusionError: they are not linears of one input, views of their results, and pointwise ops.
    """
    made: set[str] = set()
    projected: set[str] = set()  # results of linears, and views of them
    sources = {node.inputs[0] for node in graph.nodes if node.op_type in LINEARS}
    if len(sources) > 1:
        raise FusionError("its linears read different inputs")
    for node in graph.nodes:
        kind = op(node.op_type).kind
        if node.op_type in LINEARS:
            if any(name in made for name in node.inputs):
                raise FusionError("a linear reads what the region computes")
            projected.update(node.outputs)
        elif kind is Kind.VIEW and node.inputs[0] in projected:
            projected.update(node.outputs)
        elif kind is not Kind.POINTWISE:
            raise FusionError(f"{node.op_type} is not a pointwise op")
        made.update(node.outputs)


def lower(graph: SubGraph, values: Mapping[str, TensorMeta], define: rows.Definitions = expression) -> LinearSpec:
    """`graph` as one kernel, given the layout of each of its values, and the scalar expressions of its ops.

    Raises:
        FusionError: it cannot be one kernel; the message says why.
    """
    check_ops(graph)
    devices = {values[name].device for name in graph.input_names}
    if len(devices) > 1:
        raise FusionError(f"its inputs are on several devices: {', '.join(sorted(map(str, devices)))}")
    linears = {node.outputs[0]: node for node in graph.nodes if node.op_type in LINEARS}
    packed = any(node.op_type != "linear" for node in linears.values())
    x = next(iter(linears.values())).inputs[0]
    count, inner = math.prod(values[x].shape[:-1]), values[x].shape[-1] if values[x].shape else 0
    most = MANY_ROWS if len(graph) > len(linears) else ALONE_ROWS
    most = PACKED_ROWS if packed else most if values[x].dtype.itemsize == 2 else MAX_ROWS
    if count > most:
        raise FusionError(f"{count} rows are more than {most}")
    if count == 0 or inner == 0:
        raise FusionError("there is nothing to multiply")
    parts = _parts(graph, values, linears)
    shapes = {values[name].shape for name in parts}
    if len(shapes) > 1:
        raise FusionError("its products differ in shape")
    (space,) = shapes
    products, nodes, known = [], [], dict(values)
    for index, (name, (node, start)) in enumerate(parts.items()):
        products.append(_product(f"%product{index}", node, start, values))
        known[f"%product{index}"] = TensorMeta(space, _dense(space), torch.float32, values[x].device)
        nodes.append(OpNode("cast", (f"%product{index}",), (name,), (("dtype", values[name].dtype),)))
        known[name] = known[f"%product{index}"]._replace(dtype=values[name].dtype)
    nodes += [node for node in graph.nodes if op(node.op_type).kind is Kind.POINTWISE]
    made = {name for node in nodes for name in node.outputs}
    read = dict.fromkeys(name for node in nodes for name in node.inputs if name not in made)
    epilogue = rows.lower(SubGraph(tuple(nodes), tuple(read), graph.output_names), known, define)
    used = {a for statement in epilogue.statements for a in statement.arguments if isinstance(a, str)}
    inputs = [
        Operand(n, values[n].dtype, _over(n, values[n], space) if n in used | set(epilogue.stores) else ())
        for n in graph.input_names
    ]
    outputs = []
    for name in graph.output_names:
        if values[name].shape != space:
            raise FusionError(f"an output of shape {list(values[name].shape)} does not fill {list(space)}")
        outputs.append(Operand(name, values[name].dtype, (True, True)))
    spec = LinearSpec(
        tuple(inputs),
        tuple(outputs),
        x,
        count if packed or count <= MAX_ROWS else None,
        inner,
        space[-1],
        tuple(products),
        epilogue.statements,
        epilogue.stores,
    )
    tensors = [_imagined(values[name]) for name in graph.input_names]
    spec.matrices([*tensors, *spec.allocate(tensors)])
    return spec


def _parts(
    graph: SubGraph, values: Mapping[str, TensorMeta], linears: Mapping[str, OpNode]
) -> dict[str, tuple[OpNode, int]]:
    """The products: value -> its linear, and the column of the linear's result at which it starts.

    A linear's result counts where a pointwise op reads it or it is returned, and so do views of it.
    """
    viewed: dict[str, tuple[OpNode, int]] = {name: (node, 0) for name, node in linears.items()}
    for node in graph.nodes:
        if op(node.op_type).kind is not Kind.VIEW:
            continue
        root, before = viewed[node.inputs[0]]
        whole = values[root.outputs[0]]
        for name in node.outputs:
            meta = values[name]
            start = before + meta.offset - values[node.inputs[0]].offset
            moving = [dim for dim, size in enumerate(whole.shape[:-1]) if size != 1]
            in_place = all(meta.stride[dim] == whole.stride[dim] for dim in moving) and meta.stride[-1:] == (1,)
            if meta.shape[:-1] != whole.shape[:-1] or not in_place or start + meta.shape[-1] > whole.shape[-1]:
                raise FusionError(f"{node.op_type} is more than a part of the columns")
            viewed[name] = (root, start)
    read = set(graph.output_names)
    for node in graph.nodes:
        if op(node.op_type).kind is Kind.POINTWISE:
            read.update(node.inputs)
    return {name: part for name, part in viewed.items() if name in read}


def _product(target: str, node: OpNode, start: int, values: Mapping[str, TensorMeta]) -> Product:
    bound = {name: node.inputs[value.index] for name, value in arguments(node).items() if isinstance(value, Arg)}
    weight, out, scheme = values[bound["weight"]], values[node.outputs[0]], node.attr("format", "")
    weighed = {"weight"} if scheme else set()
    found = {values[name].dtype for role, name in bound.items() if role not in weighed} | {out.dtype}
    if len(found) > 1 or out.dtype not in DTYPES:
        raise FusionError(f"a linear of {', '.join(sorted(map(str, found)))} is not supported")
    reach = sum((size - 1) * step for size, step in zip(weight.shape, weight.stride, strict=True))
    if reach >= 2**31:
        raise FusionError(f"{reach} elements need 64-bit offsets")
    transposed = bool(node.attr("transposed"))
    along_k, along_n = weight.stride[::-1] if not transposed else weight.stride
    if 1 not in (along_k, along_n) and 1 not in weight.shape:
        raise FusionError("the weight's elements do not lie next to each other")
    unit = along_k == 1 or along_n != 1
    if scheme and not unit:
        raise FusionError("the bytes of a packed row do not lie next to each other")
    return Product(target, bound["weight"], bound.get("bias", ""), start, transposed, unit, scheme)


def _over(name: str, meta: TensorMeta, space: tuple[int, ...]) -> tuple[bool, bool]:
    """Whether an operand of the epilogue moves along the rows and along the columns."""
    shape = (1,) * (len(space) - len(meta.shape)) + meta.shape
    leading = [size != 1 for size in space[:-1]]
    moves = [size != 1 for size in shape[:-1]]
    if any(moves) and moves != leading:
        raise FusionError(f"{name} of shape {list(meta.shape)} broadcasts over a part of the rows")
    return any(moves), shape[-1] != 1


def _imagined(meta: TensorMeta) -> torch.Tensor:
    return torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device="meta")


def _dense(shape: Sequence[int]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()
