"""How each call is treated: what is recorded, what is refused, and what gives Python something that a guard must hold.

The dispatcher's ops are told apart by their schemas and tags; what reads a tensor where no dispatch shows it is listed.
"""

from __future__ import annotations

import contextlib
import enum
import functools
from typing import Any

import torch
from torch.utils import _pytree as pytree

aten = torch.ops.aten

# Methods that hand a tensor's data to Python below the dispatcher.
READS_DATA = {
    torch.Tensor.tolist: "tolist()",
    torch.Tensor.numpy: "numpy()",
    torch.Tensor.__array__: "numpy.asarray()",
    torch.Tensor.__dlpack__: "__dlpack__()",
}

STORAGES = frozenset({torch.Tensor.untyped_storage, torch.Tensor.storage, torch.Tensor._typed_storage})
# What Python code can ask of a tensor besides what a signature holds.
PROPERTIES = {
    (asked if callable(asked) else asked.__get__): name
    for name in (
        "storage_offset",
        "is_shared",
        "is_pinned",
        "is_inference",
        "grad",
        "_version",
        "requires_grad",
        "is_leaf",
    )
    for asked in (getattr(torch.Tensor, name),)
} | {torch.Tensor.grad_fn.__get__: "grad_fn"}  # type: ignore[union-attr]


class Treatment(enum.Enum):
    """What the recorder does with a dispatcher's op."""

    RUN = "run it unrecorded"
    RECORD = "record it"
    CONSTANT = "its result is a literal of the code"
    READ = "its result is a Python value"
    MIXED = "its results are tensors and Python values"
    SHAPE = "the shape of its result may depend on data"


@functools.cache
def treatment_of(func: Any) -> Treatment:
    """How calls of an op are treated."""
    if not isinstance(func, torch._ops.OpOverload) or func.namespace == "profiler":
        return Treatment.RUN
    if func is aten.lift_fresh.default:
        return Treatment.CONSTANT
    if torch.Tag.data_dependent_output in func.tags:
        return Treatment.READ
    tensors = ["Tensor" in str(value.type) for value in func._schema.returns]
    if tensors and not any(tensors):
        return Treatment.READ if func.namespace != "aten" or func._opname in _NUMBERS else Treatment.RUN
    if not all(tensors) and func.namespace != "aten":
        return Treatment.MIXED
    return Treatment.SHAPE if torch.Tag.dynamic_output_shape in func.tags else Treatment.RECORD


# Of ATen's ops that give Python values, those whose values are data; the others tell shapes, or choose an algorithm.
_NUMBERS = frozenset({"_nnz", "q_scale", "q_zero_point", "q_per_channel_axis", "qscheme", "_choose_qparams_per_tensor"})
_NUMBERS |= {"is_coalesced", "allclose", "equal", "is_nonzero", "item", "_nested_tensor_from_mask_left_aligned"}
_NUMBERS |= {"_is_zerotensor", "sparse_dim", "dense_dim", "_dimI", "_dimV"}
# Ops that read the values of an input (by position) where no dispatch shows it, and give results of another shape.
READS_INPUTS: dict[str, tuple[int, ...]] = {
    "_pack_padded_sequence": (1,),
    "_pad_packed_sequence": (1,),
    "_ctc_loss": (2, 3),
    "ctc_loss": (2, 3),
}


def read_by(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The tensors whose values a function reads in C++ above the dispatcher, to decide what it runs."""
    if func in (torch.tensor_split, torch.Tensor.tensor_split):
        given = [*args[1:2], kwargs.get("tensor_indices_or_sections"), kwargs.get("indices_or_sections")]
    elif func in _RECURRENT and len(args) > 2 and not isinstance(args[2], (list, tuple)):
        given = [args[1]]  # the batch sizes of a packed sequence
    elif func in _RECURRENT and len(args) > 3 and isinstance(args[3], (list, tuple)):
        given = [args[1]]
    else:
        return []
    return [tensor for tensor in given if isinstance(tensor, torch.Tensor)]


_RECURRENT = frozenset(getattr(torch._VF, name) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu"))


def by_values(func: Any, args: Any) -> bool:
    """Whether the shape of the result does depend on values: of ``aten.index``, only with a mask among the indices."""
    return func is not aten.index.Tensor or any(
        index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    )


@functools.cache
def _is_composed_below(func: Any) -> bool:
    """Whether an op's kernel calls other ops, and is for all devices."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return bool(has(func.name(), "CompositeExplicitAutogradNonFunctional"))


def casts_inside(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether autocast, which is on, casts what an op calls in its kernel, below the dispatch that a recording sees."""
    if not _is_composed_below(func) or func._schema.is_mutable:
        return False
    keys = [getattr(torch._C.DispatchKey, name) for name in ("AutocastCPU", "AutocastCUDA")]
    with contextlib.ExitStack() as stack:
        for key in keys:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        results = pytree.tree_leaves(func(*args, **kwargs))
    pairs = zip(results, pytree.tree_leaves(func(*args, **kwargs)), strict=True)
    return any(one.dtype is not other.dtype or not torch.equal(one, other) for one, other in pairs)
