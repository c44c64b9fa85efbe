"""From a region to a kernel: the compiler, the specs, and a folder for each target.

Imports `graph_capture.record` and what lies below it; passes and frontends stand beside it.
"""

from graph_capture.codegen.compiler import CompiledKernel, KernelCompiler, compile_for, is_native
from graph_capture.codegen.ninetoothed.aot import Binary
from graph_capture.codegen.spec.lower import infer_values, supports
from graph_capture.codegen.target import Target, register_target, unregister_target

__all__ = [
    "Binary",
    "CompiledKernel",
    "KernelCompiler",
    "Target",
    "compile_for",
    "infer_values",
    "is_native",
    "register_target",
    "supports",
    "unregister_target",
]
