"""Checking every so many replays in production: on copies, so that nothing is written twice and no result changes."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from graph_capture.errors import DataDependentError
from graph_capture.ir.effects import is_random
from graph_capture.ir.memory import RandomState, storage_bytes
from graph_capture.log import log
from graph_capture.runtime.account.verify import Verification, verify
from graph_capture.runtime.program import Program


def check_sample(program: Program, tensors: Mapping[str, torch.Tensor]) -> Verification | None:
    """Verify the kernels that `program` uses on a tensor for each input of its graph, and log the outcome, worst first.

    Returns:
        The outcome; None where the check itself failed, which is logged as well.
    """
    random = RandomState() if any(map(is_random, program.recorded.subgraph.nodes)) else None
    try:
        found = verify(program, _copied(program, tensors), used=True)
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


def _copied(program: Program, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a replay, with copies of the memory that it writes; what shares memory still does."""
    tensors = dict(given)
    copies: dict[int, torch.Tensor] = {}
    for name in program.recorded.written:
        tensor = tensors[name]
        key = tensor.untyped_storage()._cdata
        if key not in copies:
            copies[key] = storage_bytes(tensor).clone()
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        tensors[name] = empty.set_(
            copies[key].untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
        )
    return tensors
