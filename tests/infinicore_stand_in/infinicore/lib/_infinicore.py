"""The extension module's stand-in: tensors on raw memory, ops that are put off while a graph is recorded.

Faithful where a frontend could be fooled: handles are compared by identity and have no attributes of their own; a view
is a new handle; ``zeros`` and ``ones`` leave memory as it is; nothing is checked, and mixed dtypes pass; shapes that
would end the real process raise `Crash`; a graph holds addresses only; and ``silu`` is not put off.
"""

import ctypes
import enum

import numpy as np
import torch


class Crash(BaseException):
    """The process would have ended here."""


class DataType(enum.IntEnum):
    BYTE = 0
    BOOL = 1
    I8 = 2
    I16 = 3
    I32 = 4
    I64 = 5
    U8 = 6
    F8 = 11
    F16 = 12
    F32 = 13
    F64 = 14
    BF16 = 19


_NUMPY = {
    DataType.BYTE: np.uint8,
    DataType.BOOL: np.bool_,
    DataType.I8: np.int8,
    DataType.I16: np.int16,
    DataType.I32: np.int32,
    DataType.I64: np.int64,
    DataType.U8: np.uint8,
    DataType.F8: np.uint8,
    DataType.F16: np.float16,
    DataType.F32: np.float32,
    DataType.F64: np.float64,
    DataType.BF16: np.uint16,
}


class RoPEAlgo(enum.Enum):
    GPT_J = 0
    GPT_NEOX = 1


class Device:
    class Type(enum.Enum):
        CPU = 0
        NVIDIA = 1

    def __init__(self, type, index=0):
        self.type, self.index = type, index

    def __eq__(self, other):
        return isinstance(other, Device) and (self.type, self.index) == (other.type, other.index)

    __hash__ = None


_live = {}  # address of memory that is allocated -> its size


class _Memory:
    def __init__(self, address, size, owned=None, device=None):
        self.address, self.size, self.owned, self.device = address, size, owned, device or Device(Device.Type.CPU)
        if owned is not None:
            _live[address] = size

    @classmethod
    def of(cls, size, device):
        if device is not None and device.type is Device.Type.NVIDIA:  # no op runs there, but memory is memory
            with torch._C._DisableTorchDispatch():
                block = torch.empty(max(1, size), dtype=torch.uint8, device="cuda")
            return cls(block.data_ptr(), size, block, device)
        buffer = (ctypes.c_uint8 * max(1, size))(*([0xAB] * min(size, 64)))
        return cls(ctypes.addressof(buffer), size, buffer)

    def __del__(self):
        if self.owned is not None:
            _live.pop(self.address, None)


class Tensor:
    __slots__ = ("__weakref__", "_layout", "_memory", "_offset", "_type")

    def __init__(self, memory, offset, shape, strides, dtype):
        self._memory, self._offset, self._type = memory, offset, dtype
        self._layout = (tuple(shape), tuple(strides))

    shape = property(lambda self: list(self._layout[0]))
    strides = property(lambda self: list(self._layout[1]))
    ndim = property(lambda self: len(self._layout[0]))
    dtype = property(lambda self: DataType(int(self._type)))
    device = property(lambda self: Device(self._memory.device.type))

    def data_ptr(self):
        return self._memory.address + self._offset if self.numel() else 0

    def numel(self):
        return int(np.prod(self._layout[0], dtype=np.int64))

    def is_contiguous(self):
        return self._layout[1] == _contiguous(self._layout[0])

    def debug(self):
        print(self._array())

    def _view(self, shape, strides, offset=0):
        return Tensor(self._memory, self._offset + offset, shape, strides, self._type)

    def as_strided(self, shape, strides):
        return self._view(shape, strides)

    def narrow(self, dim, start, length):
        shape, strides = self.shape, self.strides
        if shape[dim] < start + length:
            raise RuntimeError("Invalid slice on tensor.")
        shape[dim] = length
        return self._view(shape, strides, start * strides[dim] * np.dtype(_NUMPY[self.dtype]).itemsize)

    def permute(self, dims):
        return self._view([self.shape[d] for d in dims], [self.strides[d] for d in dims])

    def squeeze(self, dim):
        shape, strides = self.shape, self.strides
        if dim >= len(shape):
            raise Crash("a dimension out of range")
        if shape[dim] != 1:
            raise RuntimeError("Invalid squeeze operation on tensor.")
        return self._view(shape[:dim] + shape[dim + 1 :], strides[:dim] + strides[dim + 1 :])

    def unsqueeze(self, dim):
        shape, strides = self.shape, self.strides
        return self._view([*shape[:dim], 1, *shape[dim:]], [*strides[:dim], 0, *strides[dim:]])

    def view(self, shape):
        if 0 in shape or int(np.prod(shape)) != self.numel():
            raise Crash("a view of another size")
        if not self.is_contiguous():
            old = [(n, s) for n, s in zip(*self._layout, strict=True) if n != 1]
            if [n for n in shape if n != 1] != [n for n, _ in old]:
                raise RuntimeError("Incompatible shape for view operation.")
            steps = iter([s for _, s in old])
            return self._view(shape, [next(steps) if n != 1 else 1 for n in shape])
        return self._view(shape, _contiguous(shape))

    def contiguous(self):
        return self._view(self.shape, self.strides) if self.is_contiguous() else rearrange(self)

    def to(self, device):
        return self._view(self.shape, self.strides)

    def copy_(self, other):
        if self.shape != other.shape:
            raise RuntimeError("Cannot copy from tensor with different shape.")
        rearrange_(self, other)

    def _array(self):
        kind = np.dtype(_NUMPY[self.dtype])
        if not self.numel():
            return np.empty(self.shape, kind)
        steps = [s * kind.itemsize for s in self.strides]
        reach = sum((n - 1) * s for n, s in zip(self.shape, steps, strict=True)) + kind.itemsize
        buffer = (ctypes.c_uint8 * reach).from_address(self.data_ptr())
        return np.lib.stride_tricks.as_strided(np.frombuffer(buffer, kind), self.shape, steps)


def _contiguous(shape):
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def empty(shape, dtype, device, pin_memory=False):
    return strided_empty(shape, _contiguous(shape), dtype, device, pin_memory)


def strided_empty(shape, strides, dtype, device, pin_memory=False):
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if n)
    return Tensor(_Memory.of((last + 1) * np.dtype(_NUMPY[dtype]).itemsize, device), 0, shape, strides, dtype)


def zeros(shape, dtype, device, pin_memory=False):
    return empty(shape, dtype, device)


def ones(shape, dtype, device, pin_memory=False):
    return empty(shape, dtype, device)


def from_blob(raw_ptr, shape, dtype, device):
    return strided_from_blob(raw_ptr, shape, _contiguous(shape), dtype, device)


def strided_from_blob(raw_ptr, shape, strides, dtype, device):
    return Tensor(_Memory(raw_ptr, 0, device=device), 0, shape, strides, dtype)


def get_device_count(kind):
    return 1


def get_device():
    return Device(Device.Type.CPU)


def sync_stream():
    pass


# --- graphs

_recording = None


class Graph:
    def __init__(self):
        self._ops = []

    def run(self):
        for op in self._ops:
            op()


def is_graph_recording():
    return _recording is not None


def start_graph_recording():
    global _recording
    _recording = Graph()


def stop_graph_recording():
    global _recording
    graph, _recording = _recording, None
    return graph


class _Raw:
    """A tensor's address and layout: what a graph holds."""

    def __init__(self, tensor):
        self._at = (tensor._memory.address, tensor._offset, tensor._memory.owned is not None)
        self._layout, self._type = tensor._layout, tensor.dtype

    def array(self):
        address, offset, owned = self._at
        if owned and address not in _live:
            raise Crash("the graph reads freed memory")
        return Tensor(_Memory(address, 0), offset, *self._layout, self._type)._array()


def _op(deferred=True, outs=1):
    """Make ``X`` and ``X_`` of a function of arrays, which returns arrays."""

    def register(function):
        name = function.__name__.strip("_")

        def in_place(*args):
            raw = [_Raw(a) if isinstance(a, Tensor) else a for a in args]

            def run():
                given = [a.array() if isinstance(a, _Raw) else a for a in raw]
                results = function(*given[outs:])
                for out, result in zip(given, results if outs > 1 else (results,), strict=False):
                    out[...] = result

            if _recording is not None and deferred:
                _recording._ops.append(run)
            else:
                run()

        def out_of_place(*args):
            tensors = [a for a in args if isinstance(a, Tensor)]
            shapes = function.shapes(*args) if hasattr(function, "shapes") else [tensors[0].shape] * outs
            made = tuple(empty(shape, function.dtype(*args), None) for shape in shapes)
            in_place(*made, *args)
            return made if outs > 1 else made[0]

        function.dtype = getattr(function, "dtype", lambda *args: args[0].dtype)
        out_of_place.__name__, in_place.__name__ = name, f"{name}_"
        globals().update({name: out_of_place, f"{name}_": in_place})
        return function

    return register


def _with(**attributes):
    def set_them(function):
        vars(function).update(attributes)
        return function

    return set_them


@_op()
def _add(a, b):
    return a + b


@_op()
def _mul(a, b):
    return a * b


@_op()
def _rearrange(x):
    return x.copy()


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


@_op(deferred=False)
def _silu(x):
    return x * _sigmoid(x)


@_op()
def _swiglu(a, b):
    return a * b * _sigmoid(b)


def _multiplied(a, b, alpha=1.0):
    return [[*a.shape[:-1], b.shape[-1]]]


@_op()
@_with(shapes=_multiplied)
def _matmul(a, b, alpha=1.0):
    if a.ndim != b.ndim or a.shape[-1] != b.shape[-2]:
        raise Crash("matrices that do not go together")
    return np.matmul(a, b) * a.dtype.type(alpha)


@_op()
@_with(shapes=lambda input, weight, bias=None: [[*input.shape[:-1], weight.shape[0]]])
def _linear(input, weight, bias=None):
    if input.shape[-1] != weight.shape[-1]:
        raise Crash("matrices that do not go together")
    product = input @ weight.T
    return product if bias is None else product + bias


def _normed(x, weight, epsilon):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + x.dtype.type(epsilon)) * weight


@_op()
def _rms_norm(x, weight, epsilon=1e-5):
    return _normed(x, weight, epsilon)


@_op(outs=2)
def _add_rms_norm(a, b, weight, epsilon=1e-5):
    return _normed(a + b, weight, epsilon), a + b


@_op()
def _causal_softmax(x):
    queries, keys = x.shape[-2:]
    ahead = np.triu(np.ones((queries, keys), bool), keys - queries + 1)
    raised = np.exp(np.where(ahead, -np.inf, x) - np.where(ahead, -np.inf, x).max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


@_op()
@_with(shapes=lambda input, weight: [[*input.shape, weight.shape[1]]], dtype=lambda input, weight: weight.dtype)
def _embedding(input, weight):
    if input.size and input.max() >= len(weight):
        raise Crash("an index out of range")
    return weight[input]


@_op()
def _rope(x, pos, sin_table, cos_table, algo):
    sin, cos = sin_table[pos][..., None, :], cos_table[pos][..., None, :]
    result = np.empty_like(x)
    half = x.shape[-1] // 2
    first, second = (
        (slice(None, half), slice(half, None)) if algo is RoPEAlgo.GPT_NEOX else (slice(0, None, 2), slice(1, None, 2))
    )
    result[..., first] = x[..., first] * cos - x[..., second] * sin
    result[..., second] = x[..., first] * sin + x[..., second] * cos
    return result


@_op(deferred=False)
@_with(shapes=lambda q, *others: [[q.shape[1], q.shape[0], q.shape[2]]])
def _attention(q, k, v, k_cache, v_cache, pos):
    length = q.shape[1]
    k_cache[:, pos : pos + length], v_cache[:, pos : pos + length] = k, v
    groups = q.shape[0] // k.shape[0]
    key, value = (np.repeat(cache[:, : pos + length], groups, 0) for cache in (k_cache, v_cache))
    scores = _causal_softmax(q @ key.transpose(0, 2, 1) * q.dtype.type(q.shape[-1] ** -0.5))
    return (scores @ value).transpose(1, 0, 2)


@_op(deferred=False)
@_with(shapes=lambda *args: [[]], dtype=lambda *args: DataType.I32)
def _random_sample(logits, random_val, topp, topk, temperature):
    """The most likely index: what any `random_val` gives with ``topk=1``."""
    if topk != 1:
        raise Crash("only topk=1")
    return logits.argmax()


def kv_caching_(k_cache, v_cache, k, v, past_kv_lengths):
    """Caches and new entries are [batch, heads, positions, width]."""
    raw = [_Raw(tensor) for tensor in (k_cache, v_cache, k, v, past_kv_lengths)]

    def run():
        keys, values, key, value, used = (tensor.array() for tensor in raw)
        for batch, start in enumerate(used):
            keys[batch, :, start : start + key.shape[2]] = key[batch]
            values[batch, :, start : start + key.shape[2]] = value[batch]

    run() if _recording is None else _recording._ops.append(run)


def topk_of(logits, count):
    """An op that no table knows."""
    return rearrange(logits)
