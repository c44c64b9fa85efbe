"""Letting a kernel start while the one before it ends: programmatic dependent launch, from sm_90 on.

Between two kernels of a stream, or of a CUDA graph, a device stands still for about a microsecond: it starts the second
once the first has ended. Here the second is started before, and waits by itself where it would first touch memory,
until all that the first wrote can be seen; so nothing happens in another order. It waits before it lets a third one
start, too: when that has waited, all three have. See CUDA's programming guide, "Programmatic Dependent Launch and
Synchronization". Imports neither the package nor torch (see `aot_worker`).
"""

from __future__ import annotations

import ast

_CUDA = "triton.language.extra.cuda"


def overlap(tree: ast.Module) -> None:
    """Have the kernel of a module that ninetoothed generated wait, and its launch be early, in place."""
    kernel, launch = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    kernel.body[:0] = ast.parse(f"{_CUDA}.gdc_wait()\n{_CUDA}.gdc_launch_dependents()").body
    (call,) = (node.value for node in launch.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
    call.keywords.append(ast.keyword("launch_pdl", ast.Constant(True)))
