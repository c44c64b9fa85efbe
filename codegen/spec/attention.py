"""Attention of a few query rows over long keys and values, as in a decode step, before any target.

The query heads that share a key head are rows of one product with it. Where a bool mask, or a mask that is -inf, leaves
a block of keys out for every row, the block is not read: of a static cache only what is filled, or within the window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from graph_capture.codegen.spec.kernel import Operand
from graph_capture.errors import FusionError
from graph_capture.ir.binding import arguments
from graph_capture.ir.graph import SubGraph
from graph_capture.ir.ops import ATTENTION_OPS
from graph_capture.ir.values import TensorMeta

MAX_ROWS = 16  # of queries for each key head: the height of a tensor core's tile
MAX_LENGTH = 8  # of queries
MAX_WIDTH = 256  # elements of a head
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class AttentionSpec:
    """``softmax(scale * query @ key.T + mask) @ value`` for each batch element and key head.

    Attributes:
        inputs: query, key, value, and the mask if there is one.
        outputs: the result, [B, H, L, V].
        batch, heads, rows: key heads in all, and the query rows of each: heads that share it times queries.
        length: S, the keys of each head.
        width, out_width: elements of a key, and of a value.
        scale: of the scores.
        mask: for the mask's batch, heads and rows, whether it moves along them; () without a mask.
        cap: what scores are soft-capped at before they are masked.
        strict: whether a query all of whose keys are masked gets NaN, rather than 0.
    """

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    batch: int
    heads: int
    rows: int
    length: int
    width: int
    out_width: int
    scale: float
    mask: tuple[bool, ...]
    cap: float | None = None
    strict: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of queries, keys, values and the result."""
        return self.outputs[0].dtype

    def allocate(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """A contiguous result for a call on `inputs`."""
        shape = (*inputs[0].shape[:-1], self.out_width)
        return [torch.empty(shape, dtype=self.dtype, device=inputs[0].device)]

    def operands(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Query [B, Hk, rows, E], key [B, Hk, S, E], value [B, Hk, S, V], the mask [B or 1, Hk or 1, rows or 1, S] if
        there is one, and the result [B, Hk, rows, V], all of them views of a call's tensors.

        Raises:
            FusionError: a tensor has another shape, or strides of which no such view can be made.
        """
        query, key, value, *mask, out = tensors
        if query.dim() == 3:  # without heads
            query, key, value, out = (tensor[:, None] for tensor in (query, key, value, out))
            mask = [m[:, None] if m.dim() == 3 else m for m in mask]
        keys = (self.batch, self.heads, self.length)
        if key.shape != (*keys, self.width) or value.shape != (*keys, self.out_width):
            raise FusionError(f"keys are {list(key.shape)} and values {list(value.shape)}, which does not fit")
        masks = [_grouped_mask(m, query, self) for m in mask]
        if self.mask and [tuple(size > 1 for size in m.shape[:3]) for m in masks] != [self.mask]:
            raise FusionError("the mask broadcasts in another way than the kernel's")
        whole = (self.batch, self.heads, self.rows)
        if any(size not in (1, full) for m in masks for size, full in zip(m.shape[:3], whole, strict=True)):
            raise FusionError(f"the mask {list(mask[0].shape)} does not broadcast over the scores")
        return [_grouped(query, self, self.width), key, value, *masks, _grouped(out, self, self.out_width)]


def _grouped(tensor: torch.Tensor, spec: AttentionSpec, width: int) -> torch.Tensor:
    """[B, H, L, E] -> [B, Hk, rows, E]."""
    shape = (spec.batch, spec.heads, spec.rows, width)
    if tensor.numel() != math.prod(shape) or tensor.shape[-1] != width:
        raise FusionError(f"{list(tensor.shape)} is not {list(shape)}")
    try:
        return tensor.view(shape)
    except RuntimeError as error:
        raise FusionError("heads and queries cannot be seen as one dimension") from error


def _grouped_mask(mask: torch.Tensor, query: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """[B or 1, H or 1, L or 1, S] -> [B or 1, Hk or 1, rows or 1, S]."""
    mask = mask[(None,) * (4 - mask.dim())]
    batch, heads, rows, length = mask.shape
    if length != spec.length:
        raise FusionError(f"the mask {list(mask.shape)} does not cover {spec.length} keys")
    if heads == rows == 1:
        return mask
    try:
        return mask.expand(batch, *query.shape[1:3], length).view(batch, spec.heads, spec.rows, length)
    except RuntimeError as error:
        raise FusionError("the mask's heads and queries cannot be seen as one dimension") from error


def claims(graph: SubGraph) -> bool:
    """Whether this lowering is for `graph`."""
    return len(graph.nodes) == 1 and graph.nodes[0].op_type in ATTENTION_OPS


def check_ops(graph: SubGraph) -> None:
    """Look at the call alone.

    Raises:
        FusionError: it asks for what the kernel does not do.
    """
    (node,) = graph.nodes
    for name in ("dropout_p", "is_causal", "fill", "tokens_first"):
        if node.attr(name):
            raise FusionError(f"attention with {name} has no kernel")


def lower(graph: SubGraph, values: Mapping[str, TensorMeta], define: object = None) -> AttentionSpec:
    """`graph` as one kernel, given the layout of each of its values; of its ops none has a scalar expression.

    Raises:
        FusionError: it cannot be one kernel; the message says why.
    """
    check_ops(graph)
    (node,) = graph.nodes
    if {values[name].device for name in node.inputs} != {values[node.outputs[0]].device}:
        raise FusionError("its inputs are on several devices")
    bound = {n: node.inputs[v.index] for n, v in arguments(node).items() if n in ("query", "key", "value", "attn_mask")}
    if len(set(bound.values())) < len(bound) or tuple(bound.values()) != graph.input_names:
        raise FusionError("its operands are the same tensor")
    query, key, value = (values[bound[name]] for name in ("query", "key", "value"))
    out = values[node.outputs[0]]
    if {meta.dtype for meta in (query, key, value, out)} != {out.dtype} or out.dtype not in DTYPES:
        raise FusionError(f"attention of {query.dtype} is not supported")
    if not len(query.shape) == len(key.shape) == len(value.shape) in (3, 4):
        raise FusionError("it is not over [B, H, L, E]")
    batch = query.shape[0]
    heads, length = (key.shape[1] if len(key.shape) == 4 else 1), key.shape[-2]
    if key.shape[0] != batch or value.shape[:-1] != key.shape[:-1]:
        raise FusionError("keys and values broadcast")
    rows = math.prod(query.shape[1:-1]) // max(1, heads)
    if query.shape[-2] > MAX_LENGTH or rows > MAX_ROWS:
        raise FusionError(f"{query.shape[-2]} queries, {rows} for each key head, are more than a decode step has")
    if 0 in (batch, heads, rows, length, query.shape[-1], value.shape[-1]):
        raise FusionError("there is nothing to attend to")
    if max(query.shape[-1], value.shape[-1]) > MAX_WIDTH:
        raise FusionError(f"heads of {query.shape[-1]} elements are wider than {MAX_WIDTH}")
    reach = max(sum((n - 1) * s for n, s in zip(m.shape, m.stride, strict=True)) for m in (query, key, value))
    if reach >= 2**31:
        raise FusionError(f"{reach} elements need 64-bit offsets")
    scale = node.attr("scale")
    if scale is not None and not math.isfinite(scale):
        raise FusionError(f"its scale is {scale}")
    spec = AttentionSpec(
        tuple(Operand(name, values[name].dtype) for name in graph.input_names),
        (Operand(node.outputs[0], out.dtype),),
        batch,
        heads,
        rows,
        length,
        query.shape[-1],
        value.shape[-1],
        float(query.shape[-1] ** -0.5 if scale is None else scale),
        (),
        node.attr("cap"),
        bool(node.attr("strict")) or node.op_type == "capped_attention",
    )
    metas = [values[name] for name in graph.input_names]
    tensors = [torch.empty_strided(m.shape, m.stride, dtype=m.dtype, device="meta") for m in metas]
    seen = spec.operands([*tensors, *spec.allocate(tensors)])
    if "attn_mask" not in bound:
        return spec
    if values[bound["attn_mask"]].dtype not in (torch.bool, out.dtype):
        raise FusionError(f"a mask of {values[bound['attn_mask']].dtype} is not supported")
    return replace(spec, mask=tuple(size > 1 for size in seen[3].shape[:3]))
