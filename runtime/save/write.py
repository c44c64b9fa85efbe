"""Writing a program into one file, for a process that has nothing of the model's code.

One safetensors file: the tensors, and as its metadata one JSON text with the graphs, the structure of arguments and
result, the regions and their decisions.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from graph_capture.cache import environment_key
from graph_capture.ir.graph_json import Encoder
from graph_capture.runtime.decide.whole import device_of
from graph_capture.runtime.library import LibraryKernel
from graph_capture.runtime.program import Program
from graph_capture.runtime.region import Decision, Region
from graph_capture.runtime.save.structure_json import encode_structure
from graph_capture.runtime.save.tensor_file import encode_tensors

FORMAT = 1
ENTRY, DIGEST = "graph_capture", "graph_capture_digest"


def save(program: Program, path: str | os.PathLike[str], weights: bool = True) -> None:
    """See `graph_capture.FusedGraph.save`."""
    from safetensors.torch import save_file

    recorded = program.recorded
    encoder = Encoder()
    tensors, captured = encode_tensors(recorded.captured, weights)
    table = {
        "format": FORMAT,
        "environment": environment_key(device_of(recorded.subgraph)),
        "recorded": encoder.graph(recorded.subgraph),
        "rewritten": encoder.graph(program.graph),
        "constants": encoder.graph(program.constants),
        "structure": encode_structure(recorded),
        "captured": captured,
        "regions": [_encode_region(region, encoder) for region in program.regions],
        "whole": None if program.whole is None else _encode_decision(program.whole),
        "receipts": [[r.rule, r.candidates, r.matches, r.ops, r.spelling] for r in program.receipts],
        "nodes": encoder.nodes,
    }
    content = json.dumps(table, allow_nan=False)
    metadata = {ENTRY: content, DIGEST: hashlib.sha256(content.encode()).hexdigest()}
    target = Path(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}_", dir=target.parent)
    os.close(descriptor)
    try:
        save_file(tensors, name, metadata)
        os.replace(name, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def _encode_decision(decision: Decision) -> dict[str, Any]:
    return {
        "use": decision.use,
        "reason": decision.reason,
        "t_fallback": decision.t_fallback,
        "t_fused": decision.t_fused,
        "choice": decision.choice,
    }


def _encode_region(region: Region, encoder: Encoder) -> dict[str, Any]:
    kernel = region.kernel
    return {
        "name": region.name,
        "node": encoder.node(region.node),
        "decision": _encode_decision(region.decision),
        "kernel": None if kernel is None else kernel.way if isinstance(kernel, LibraryKernel) else "compiled",
        "weights": list(kernel.weights) if isinstance(kernel, LibraryKernel) else [],
        "parts": None if region.parts is None else encoder.graph(region.parts),
        "parent": region.parent,
    }
