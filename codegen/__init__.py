"""From a fused region to a kernel."""

from graph_capture.codegen.aot import Binary
from graph_capture.codegen.compiler import CompiledKernel, KernelCompiler, compile_for
from graph_capture.codegen.lower import infer_values, supports
from graph_capture.codegen.ninetoothed_host import interpreted

__all__ = ["Binary", "CompiledKernel", "KernelCompiler", "compile_for", "infer_values", "interpreted", "supports"]
