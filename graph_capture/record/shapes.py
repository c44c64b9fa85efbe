"""What a call gives, as far as its shape: for calls that are recorded before what they read is there."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graph_capture.ir.layouts import like
from graph_capture.ir.ops import Kind, Op


def storage_of(tensor: torch.Tensor) -> int:
    """What identifies a tensor's storage while that lives."""
    return tensor.untyped_storage()._cdata


def shaped(target: Op, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
    """What a call would give, without running it: uninitialised memory, or views of what there is."""
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if target.kind is Kind.VIEW or not leaves:
        return run()
    if target.may_write:
        return args[0] if target.returns_values else None
    with torch._C._DisableTorchDispatch():
        given = pytree.tree_map_only(torch.Tensor, lambda tensor: like(tensor, "meta"), (args, kwargs))
        made = target.function(*given[0], **given[1])
        return pytree.tree_map_only(torch.Tensor, lambda tensor: like(tensor, leaves[0].device), made)


@functools.cache
def short_name(op_type: str) -> str:
    """``aten.index_copy_.default`` -> ``index_copy_``; the stem for value names."""
    parts = op_type.split(".")
    return re.sub(r"\W", "_", parts[1] if len(parts) == 3 else parts[0])
