"""Checking every so many replays in production: on copies, so that nothing is written twice and no result changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from graph_capture.runtime.verify import Verification, verify

from graph_capture.errors import DataDependentError
from graph_capture.log import log
from graph_capture.ops import is_random
from graph_capture.signature import Bound
from graph_capture.witness import RandomState, storage_bytes

if TYPE_CHECKING:
    from graph_capture.runtime.fused import FusedGraph


def check_sample(fused: FusedGraph, call: Bound) -> Verification | None:
    """Verify the kernels that `fused` uses on the arguments of `call`, and log the outcome, worst first.

    Returns:
        The outcome; None where the check itself failed, which is logged as well.
    """
    random = RandomState() if any(map(is_random, fused.recorded.subgraph.nodes)) else None
    try:
        found = verify(fused, _copied(fused, call), used=True)
    except DataDependentError:  # a guard; the replay itself will say so
        return None
    except Exception as error:
        log.warning("a replay could not be checked: %s: %s", type(error).__name__, error)
        return None
    finally:
        if random is not None:
            random.restore()
    off = sum(not row["ok"] for row in found.rows)
    if off:
        log.warning("%d of %d kernels are off, worst first:\n%s", off, len(found.rows), found)
    elif found.rows:
        log.info("a replay was checked, worst first:\n%s", found)
    return found


def _copied(fused: FusedGraph, call: Bound) -> dict[str, torch.Tensor]:
    """The tensors of a replay, with copies of the memory that it writes; what shares memory still does."""
    tensors = fused.tensors(call)
    copies: dict[int, torch.Tensor] = {}
    for name in fused.recorded.written:
        tensor = tensors[name]
        key = tensor.untyped_storage()._cdata
        if key not in copies:
            copies[key] = storage_bytes(tensor).clone()
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        tensors[name] = empty.set_(
            copies[key].untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
        )
    return tensors
