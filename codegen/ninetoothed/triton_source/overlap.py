"""Letting a kernel start while the one before it ends: programmatic dependent launch, from sm_90 on.

Between two kernels of a stream, or of a CUDA graph, a device stands still for about a microsecond: it starts the second
once the first has ended. Here the second is started before, and waits by itself where it would first touch memory,
until the first has ended and all that it wrote can be seen; so nothing happens in another order. A third one may start
before that wait, too: it waits for the second, which ends after it has waited for the first. It is let in at once
where blocks are light, and their loads do not compete with its start; where they take much of a multiprocessor, a third
kernel's blocks would be in the second's way, and are let in after the wait. See CUDA's programming guide, "Programmatic
Dependent Launch and Synchronization".
"""

from __future__ import annotations

import ast

_CUDA = "triton.language.extra.cuda"


def overlap(tree: ast.Module, light: bool) -> None:
    """Have the kernel of a module that ninetoothed generated wait, and its launch be early, in place."""
    kernel, launch = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    calls = ast.parse(f"{_CUDA}.gdc_launch_dependents()\n{_CUDA}.gdc_wait()").body
    kernel.body[:0] = calls if light else calls[::-1]
    (call,) = (node.value for node in launch.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
    call.keywords.append(ast.keyword("launch_pdl", ast.Constant(True)))
