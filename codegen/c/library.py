"""Torch's own ops as parts of C launches, with the same bits: without Python and the dispatcher between them, small
ops cost what they compute.

Elementwise ops are those whose float32 result IEEE 754 defines (``c/library.c``). Matrix products of few rows are
torch's own, called through AOTInductor's C shim; threads share the columns of one, which the library computes on one.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graph_capture.cache import DiskCache
from graph_capture.codegen.c import host
from graph_capture.codegen.launches import Emit, Launch, Tensors, Writer
from graph_capture.codegen.spec.geometry import arrange
from graph_capture.errors import FusionError
from graph_capture.ir.binding import call_of
from graph_capture.ir.graph import OpNode
from graph_capture.ir.numerics import same_bits
from graph_capture.ir.ops import op

SMALL = 2**14  # elements of an output, beyond which calling an op costs little
ROWS = 8  # of a matrix product that reads its weight once, and does little else
PIECE = 2**17  # bytes of a weight that are worth a thread
MOST = 2  # pieces for each thread: one that is held up holds up little
ALIGNED = 16  # columns
COPY, NEGATE, MAGNITUDE, ROOT, RECIPROCAL, RECIPROCAL_ROOT, ADD, SUBTRACT, MULTIPLY, DIVIDE = range(10)
UNARY = {"neg": NEGATE, "abs": MAGNITUDE, "sqrt": ROOT, "reciprocal": RECIPROCAL, "rsqrt": RECIPROCAL_ROOT}
UNARY |= {"cast": COPY, "aten.clone.default": COPY}
BINARY = {"add": ADD, "sub": SUBTRACT, "mul": MULTIPLY, "div": DIVIDE}
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BITS16, NUMBER = 3, 4
PROBE = 1003  # values: many vectors, and some that are left over
NO_THREADS = 2**62  # the grain of what one thread does


def writer(node: OpNode, inputs: Tensors, result: torch.Tensor) -> Writer | None:
    """A form of the op as C launches, which has torch's bits as far as probes show; None where there is none."""
    tensors = (*inputs, result)
    if not all(t.is_cpu and t.layout is torch.strided and t.dtype in KINDS for t in tensors) or not result.numel():
        return None
    if node.op_type == "linear":
        return _linear(node, inputs, result)
    if result.numel() > SMALL:
        return None
    if node.op_type == "aten.cat.default":
        return _cat(node, inputs)
    found = _elementwise(node, inputs, result.dtype)
    return _launching(*found) if found is not None and _has_torchs_bits(node, *found, tuple(inputs)) else None


def _elementwise(node: OpNode, inputs: Tensors, dtype: torch.dtype) -> tuple[SmallOp, tuple[int, ...]] | None:
    """An op on each element, and the inputs that it reads, by position."""
    kind, number = node.op_type, node.attr("other")
    if kind in UNARY and len(inputs) == 1:
        return SmallOp(UNARY[kind]), (0,)
    if kind == "pow" and len(inputs) == 1 and node.attr("exponent") == 2:
        return SmallOp(MULTIPLY), (0, 0)
    if kind not in BINARY or node.attr("alpha", 1) != 1 or node.attr("rounding_mode") is not None:
        return None
    if len(inputs) == 2 and (inputs[0].dtype == inputs[1].dtype or dtype == torch.float32):
        return SmallOp(BINARY[kind]), (0, 1)
    if len(inputs) != 1 or type(number) not in (int, float):
        return None
    rounded = torch.tensor(number, dtype=dtype).item() if kind in ("add", "sub") else number  # as torch does
    return SmallOp(BINARY[kind], float(rounded)), (0,)


_probed: dict[Any, bool] = {}


def _has_torchs_bits(node: OpNode, kernel: SmallOp, reads: Sequence[int], inputs: Tensors) -> bool:
    """Whether torch, by vectors and one by one, gives the bits of the kernel: tried once a process."""
    key = (node.op_type, repr(node.attrs), tuple(tensor.dtype for tensor in inputs))
    if key not in _probed:
        given = [_magnitudes(PROBE, seed).to(tensor.dtype) for seed, tensor in enumerate(inputs)]
        args, keywords = call_of(node, given)
        want = op(node.op_type).function(*args, **keywords)
        out = torch.empty_like(want)
        kernel.prepare([given[index] for index in reads], [out])()
        _probed[key] = same_bits(out.nan_to_num(nan=1.0), want.nan_to_num(nan=1.0))
    return _probed[key]


def _magnitudes(count: int, seed: int, spread: float = 8.0) -> torch.Tensor:
    """Noise over many powers of two."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator) * torch.exp2(spread * torch.randn(count, generator=generator))


def _launching(kernel: SmallOp, reads: Sequence[int]) -> Writer:
    def form(emit: Emit[Any], inputs: Sequence[Any], out: Any) -> None:
        emit.launch(kernel, [inputs[index] for index in reads], [out])

    return form


def _cat(node: OpNode, inputs: Tensors) -> Writer | None:
    dim = node.attr("dim", 0)
    sizes = [tensor.shape[dim] if tensor.dim() else 0 for tensor in inputs]
    if 0 in sizes or len({tensor.dtype for tensor in inputs}) > 1:
        return None

    def form(emit: Emit[Any], inputs: Sequence[Any], out: Any) -> None:
        first = 0
        for tensor, size in zip(inputs, sizes, strict=True):
            emit.launch(SmallOp(COPY), [tensor], [emit.view(torch.narrow, out, dim, first, size)])
            first += size

    return form


def _linear(node: OpNode, inputs: Tensors, result: torch.Tensor) -> Writer | None:
    rows = inputs[0].shape[:-1].numel()
    if node.attr("transposed") or len(inputs) != 2 or inputs[0].dim() < 2 or rows > ROWS or _shim() is None:
        return None
    if not all(tensor.is_contiguous() for tensor in inputs):  # as the probe's are
        return None
    wide, narrow = inputs[1].shape
    if not _adds_in_torchs_order(rows, wide, narrow, result.dtype, torch.get_num_threads()):
        return None

    def form(emit: Emit[Any], inputs: Sequence[Any], out: Any) -> None:
        x, weight = emit.view(torch.Tensor.view, inputs[0], (rows, narrow)), emit.view(torch.t, inputs[1])
        emit.launch(LibraryProduct(), [x, weight], [emit.view(torch.Tensor.view, out, (rows, wide))])

    return form


@functools.cache
def _adds_in_torchs_order(rows: int, wide: int, narrow: int, dtype: torch.dtype, threads: int) -> bool:
    """Whether the pieces of a product have the whole one's bits, where nothing is left of a sum but its rounding."""
    spread = 1.5 if dtype == torch.float16 else 8.0
    x, weight = _magnitudes(narrow // 2, 0, spread), _magnitudes(narrow // 2 * ALIGNED, 1, spread).view(ALIGNED, -1)
    left = torch.cat([x, -x.flip(0), x.new_zeros(narrow % 2)]).to(dtype).expand(rows, narrow).contiguous()
    right = torch.cat([weight, weight.flip(1), weight.new_zeros(ALIGNED, narrow % 2)], 1).to(dtype)
    right = right.repeat(-(-wide // ALIGNED), 1)[:wide].t()
    out = left.new_empty(rows, wide)
    LibraryProduct().prepare([left, right], [out])()
    want = torch.mm(left, right)
    return same_bits(out, want) and bool(want.isfinite().all())


class _Library:
    """What is bound to addresses, and is not expected to fail."""

    movable = False

    def failed(self, error: Exception, inputs: Tensors, outputs: Tensors) -> Launch:
        """See `graph_capture.codegen.launches.Prepares`: there is nothing in its place."""
        raise error


@dataclass(frozen=True)
class SmallOp(_Library):
    """An op on each element of one tensor, or of two, or of one and a number."""

    op: int
    number: float | None = None

    def prepare(self, inputs: Tensors, outputs: Tensors) -> Launch:
        """See `graph_capture.codegen.launches.Prepares`."""
        left, right, out = inputs[0], inputs[-1], outputs[0]
        kinds = [KINDS[tensor.dtype] for tensor in (left, right, out)]
        if self.op == COPY and left.dtype == out.dtype and left.itemsize == 2:
            kinds = [BITS16] * 3
        elif self.number is not None:
            kinds[1] = NUMBER
        tensors = (left, right, out)
        over = arrange(out.shape, [t.shape for t in tensors], [t.stride() for t in tensors], flat=True, rows=False)
        bits = ctypes.c_int64.from_buffer(ctypes.c_double(0.0 if self.number is None else self.number)).value
        strides = [step for operand in over.strides for step in operand]
        numbers = (self.op, *kinds, bits, len(over.sizes), *over.sizes, *strides)
        units = over.elements // over.sizes[-1]
        addresses = [tensor.data_ptr() for tensor in tensors]
        return host.call(_toolchain().runtime.small_op, addresses, numbers, units, NO_THREADS)


class LibraryProduct(_Library):
    """A matrix product: left, right -> output."""

    def prepare(self, inputs: Tensors, outputs: Tensors) -> Launch:
        """See `graph_capture.codegen.launches.Prepares`."""
        shim, (left, right), (out,) = _shim(), inputs, outputs
        if shim is None:
            raise FusionError("this torch has no C shim of mm")
        columns = right.shape[1]
        pieces = max(1, min(MOST * torch.get_num_threads(), right.nbytes // PIECE, columns // ALIGNED))
        bounds = [columns * piece // pieces // ALIGNED * ALIGNED for piece in range(pieces)] + [columns]
        parts = [(out[:, first:last], left, right[:, first:last]) for first, last in itertools.pairwise(bounds)]
        handles = Handles(shim, [tensor for part in parts for tensor in part])
        grain = 1 if pieces > 1 else NO_THREADS
        body, function = _toolchain().runtime.products, ctypes.cast(shim.mm, ctypes.c_void_p).value
        assert function is not None
        return host.call(body, handles.addresses, [function], pieces, grain, handles)


@dataclass(frozen=True)
class Shim:
    """What this torch offers to C: `mm` of three handles, and `delete` of one."""

    mm: Any
    delete: Any


@functools.cache
def _shim() -> Shim | None:
    try:
        library = ctypes.CDLL(torch._C.__file__)
        mm, delete = library.aoti_torch_cpu_mm_out, library.aoti_torch_delete_tensor_object
        _ = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors
    except (AttributeError, OSError):
        return None
    delete.argtypes = [ctypes.c_void_p]
    return Shim(mm, delete)


class Handles:
    """Tensors as the shim knows them, for as long as this lives; no gradient is ever asked of them."""

    def __init__(self, shim: Shim, tensors: Sequence[torch.Tensor]) -> None:
        capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([tensor.detach() for tensor in tensors])
        self.addresses = [_pointer(capsule, None) for capsule in capsules]
        weakref.finalize(self, _delete, shim.delete, self.addresses)


def _delete(delete: Any, addresses: Sequence[int]) -> None:
    for address in addresses:
        delete(address)


_pointer: Callable[[Any, None], int] = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _toolchain() -> host.Toolchain:
    return host.toolchain(DiskCache("kernels"))
