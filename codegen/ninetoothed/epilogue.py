"""What the printers of a `LinearSpec` share: operands as parameters, weights in tiles, the ops behind the products."""

from __future__ import annotations

from abc import ABC, abstractmethod

from graph_capture.codegen.ninetoothed.printing import print_arguments, print_statement
from graph_capture.codegen.spec.linear import LinearSpec


class LinearPrinter(ABC):
    """Writes the module that ninetoothed compiles for a spec."""

    def __init__(self, spec: LinearSpec, interpreted: bool) -> None:
        self.spec, self.interpreted = spec, interpreted
        self.weights = [f"weight{index}" for index in range(len(spec.products))]
        self.biases = {p.target: f"bias{index}" for index, p in enumerate(spec.products) if p.bias}
        self.extras = [f"extra{index}" for index in range(len(spec.extras))]
        self.outputs = [f"out{index}" for index in range(len(spec.outputs))]
        self.parameters = ("x", *self.weights, *self.biases.values(), *self.extras, *self.outputs)

    def source(self) -> str:
        """The module: an arrangement and an application."""
        parameters = ", ".join(self.parameters)
        tiles = ["return (", *(f"    {name}_tiles," for name in self.parameters), ")"]
        lines = ["import ninetoothed.language as ntl", "", ""]
        lines += [f"def arrangement({parameters}):", *(f"    {line}" for line in (*self.arrangement(), *tiles))]
        lines += ["", "", f"def application({parameters}):", *(f"    {line}" for line in self.application())]
        return "\n".join(lines) + "\n"

    @abstractmethod
    def arrangement(self) -> list[str]:
        """Lines that make ``NAME_tiles`` of each parameter."""

    @abstractmethod
    def application(self) -> list[str]:
        """Lines that compute a block."""

    def weight_tiles(self, columns: int, inner: int) -> list[str]:
        """Lines that make a list of tiles along K of each block of columns of a weight."""
        spec, lines = self.spec, []
        for name, product in zip(self.weights, spec.products, strict=True):
            shape, tile, along, place = (spec.columns, spec.inner), (columns, inner), "tile((1, -1))", 0
            if not product.unit:
                shape, tile, along, place = shape[::-1], tile[::-1], "tile((-1, 1)).permute((1, 0))", 1
            lines += [
                f"{name}.shape = {shape}",
                f"{name}_tiles = {name}.tile({tile}).{along}",
                f"{name}_tiles.dtype = {name}_tiles.dtype.squeeze({place})",
            ]
        return lines

    def moves(self) -> list[tuple[str, tuple[bool, bool]]]:
        """The parameters behind the products, and whether each moves along the rows and along the columns."""
        biases = [(name, (False, True)) for name in self.biases.values()]
        extras = [(n, (o.over[0], o.over[1])) for n, o in zip(self.extras, self.spec.extras, strict=True)]
        return [*biases, *extras, *((name, (True, True)) for name in self.outputs)]

    def epilogue(self, totals: list[str], group: int | None = None) -> list[str]:
        """What follows the products `totals`, over [rows, columns of a block].

        With `group` the parameters are lists of groups of rows, of which this one is worked on.
        """
        spec = self.spec

        def part(name: str, moves: bool) -> str:
            return name if group is None else f"{name}[{group if moves else 0}]"

        values: dict[str, str] = {}
        lines = []
        for index, (product, total) in enumerate(zip(spec.products, totals, strict=True)):
            values[product.target] = f"product{index}"
            bias = f" + ntl.cast({part(self.biases[product.target], False)}, ntl.float32)" if product.bias else ""
            lines.append(f"product{index} = {total}{bias}")
        for name, operand in zip(self.extras, spec.extras, strict=True):
            values[operand.name] = f"{name}_value"
            lines.append(f"{name}_value = {part(name, operand.over[0])}")
        for statement in spec.statements:
            values[statement.target] = f"v{statement.target[1:]}"
            arguments = print_arguments(statement, values)
            lines.append(f"{values[statement.target]} = {print_statement(statement, arguments)}")
        for name, stored in zip(self.outputs, spec.stores, strict=True):
            lines.append(f"{part(name, True)} = {values[stored]}")
        return lines
