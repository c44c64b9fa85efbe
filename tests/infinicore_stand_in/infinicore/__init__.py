"""A stand-in for InfiniCore's Python package, written from what the real one was seen to do; for tests only."""

import numpy as np

from infinicore import lib
from infinicore.lib import _infinicore

use_ntops = False
_DTYPES = {"float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "int64": "I64"}


class dtype:
    def __init__(self, data_type):
        self._underlying = data_type

    def __eq__(self, other):
        return isinstance(other, dtype) and self._underlying == other._underlying

    def __hash__(self):
        return hash(self._underlying)


for _name, _value in {**_DTYPES, "uint8": "U8", "bool": "BOOL", "int8": "I8", "float8": "F8"}.items():
    globals()[_name] = dtype(_infinicore.DataType[_value])


class device:
    def __init__(self, type="cpu", index=None):
        self.type, self.index = type, index or 0

    def __getattr__(self, name):
        if name != "_underlying":
            raise AttributeError(name)
        kind = _infinicore.Device.Type
        self._underlying = _infinicore.Device(kind.CPU if self.type == "cpu" else kind.NVIDIA, self.index)
        return self._underlying

    def __eq__(self, other):
        return isinstance(other, device) and (self.type, self.index) == (other.type, other.index)

    @staticmethod
    def _from_infinicore_device(found):
        return device("cpu" if found.type is _infinicore.Device.Type.CPU else "cuda", found.index)


class Tensor:
    def __init__(self, underlying, *, _torch_ref=None):
        self._underlying = underlying
        self._torch_ref = _torch_ref

    def __getattr__(self, name):
        make = {"shape": lambda it: it, "dtype": dtype, "device": device._from_infinicore_device}.get(name)
        if make is None:
            raise AttributeError(name)
        setattr(self, name, make(getattr(self._underlying, name)))
        return getattr(self, name)

    ndim = property(lambda self: self._underlying.ndim)

    def data_ptr(self):
        return self._underlying.data_ptr()

    def stride(self, dim=None):
        return self._underlying.strides if dim is None else self._underlying.strides[dim]

    def is_contiguous(self):
        return self._underlying.is_contiguous()

    def copy_(self, src):
        self._underlying.copy_(src._underlying)

    def to(self, *args):
        return Tensor(self._underlying.to(*(arg._underlying for arg in args)))

    def contiguous(self):
        return Tensor(self._underlying.contiguous())

    def as_strided(self, size, stride):
        return Tensor(self._underlying.as_strided(size, stride))

    def permute(self, dims):
        return Tensor(self._underlying.permute(dims))

    def view(self, shape):
        return Tensor(self._underlying.view(shape))

    def squeeze(self, dim):
        return Tensor(self._underlying.squeeze(dim))

    def unsqueeze(self, dim):
        return Tensor(self._underlying.unsqueeze(dim))

    def narrow(self, dim, start, length):
        return Tensor(self._underlying.narrow(dim, start, length))

    def debug(self):
        self._underlying.debug()

    def __add__(self, other):
        return add(self, other)

    def __iadd__(self, other):
        return add(self, other, out=self)

    def __mul__(self, other):
        return mul(self, other)

    def __matmul__(self, other):
        return matmul(self, other)


def _call(name, out, *args):
    """What every function does: look the extension's up, now."""
    given = [arg._underlying if isinstance(arg, Tensor) else arg for arg in args]
    if out is None:
        return Tensor(getattr(_infinicore, name)(*given))
    getattr(_infinicore, f"{name}_")(out._underlying, *given)
    return out


def add(input, other, *, out=None):
    return _call("add", out, input, other)


def mul(input, other, *, out=None):
    return _call("mul", out, input, other)


def matmul(input, other, *, alpha=1.0, out=None):
    return _call("matmul", out, input, other, alpha)


def rearrange(input, other=None, *, out=None):
    return _call("rearrange", out, input)


def add_rms_norm(a, b, weight, epsilon=1e-5, *, out=None, residual=None):
    out = out or empty(a.shape, dtype=a.dtype, device=a.device)
    residual = residual or empty(b.shape, dtype=b.dtype, device=b.device)
    given = (tensor._underlying for tensor in (out, residual, a, b, weight))
    _infinicore.add_rms_norm_(*given, epsilon)
    return out, residual


def attention(q, k, v, k_cache, v_cache, pos, *, out=None):
    return _call("attention", out, q, k, v, k_cache, v_cache, pos)


def kv_caching(k_cache, v_cache, k, v, past_kv_lengths):
    _infinicore.kv_caching_(*(tensor._underlying for tensor in (k_cache, v_cache, k, v, past_kv_lengths)))
    return k_cache, v_cache


def empty(size, *, dtype=None, device=None, pin_memory=False):
    return Tensor(_infinicore.empty(size, dtype._underlying, device._underlying, pin_memory))


def zeros(size, *, dtype=None, device=None, pin_memory=False):
    return Tensor(_infinicore.zeros(size, dtype._underlying, device._underlying, pin_memory))


def strided_empty(size, strides, *, dtype=None, device=None, pin_memory=False):
    return Tensor(_infinicore.strided_empty(size, strides, dtype._underlying, device._underlying, pin_memory))


def from_torch(tensor):
    found = globals()[str(tensor.dtype).removeprefix("torch.")]
    made = _infinicore.from_blob(
        tensor.data_ptr(), list(tensor.shape), dtype=found._underlying, device=device(tensor.device.type)._underlying
    )
    return Tensor(made, _torch_ref=tensor)


def from_numpy(array, *, dtype=None, device=None):
    kind = dtype or globals()[str(array.dtype)]
    array = np.ascontiguousarray(array.astype(_infinicore._NUMPY[kind._underlying]))
    cpu = globals()["device"]()
    temporary = _infinicore.from_blob(
        array.ctypes.data, list(array.shape), dtype=kind._underlying, device=cpu._underlying
    )
    result = empty(list(array.shape), dtype=kind, device=cpu)
    result.copy_(Tensor(temporary))
    return result


def from_list(data, *, dtype=None, device=None):
    return from_numpy(np.array(data), dtype=dtype, device=device)


class Graph:
    def __init__(self, graph):
        self._graph = graph

    def run(self):
        return self._graph.run()


def is_graph_recording():
    return _infinicore.is_graph_recording()


def start_graph_recording():
    _infinicore.start_graph_recording()


def stop_graph_recording():
    return Graph(_infinicore.stop_graph_recording())


from infinicore import nn  # noqa: E402

__all__ = ["Tensor", "lib", "nn"]
