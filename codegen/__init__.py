"""From a fused region to a kernel."""

from graph_capture.codegen import c_library
from graph_capture.codegen.aot import Binary
from graph_capture.codegen.compiler import CompiledKernel, KernelCompiler, compile_for, is_native
from graph_capture.codegen.lower import infer_values, supports

from graph_capture.forms import NATIVE

__all__ = ["Binary", "CompiledKernel", "KernelCompiler", "compile_for", "infer_values", "is_native", "supports"]

NATIVE.append(c_library.writer)
