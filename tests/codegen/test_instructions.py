"""Functions that become one instruction, and the kernel that compiling processes warm up with."""

import ast
import base64
import subprocess
import sys

import torch
from graph_capture.codegen import aot_worker, ninetoothed_rows
from graph_capture.codegen.instructions import use_instructions
from graph_capture.codegen.workers import Pool

from graph_capture import KernelCompiler, OpNode, SubGraph

INSTRUCTION = "rsqrt.approx.ftz.f32"


def rms_norm(dtype):
    graph = SubGraph((OpNode("rms_norm", ("x", "w"), ("y",), {"eps": 1e-6}),), ("x", "w"), ("y",))
    kernel = KernelCompiler("ninetoothed").compile(graph, [dtype] * 2, [(4, 64), (64,)])
    return ninetoothed_rows.program(kernel.spec, interpreted=False)


def test_only_calls_of_such_functions_are_replaced():
    tree = ast.parse("def kernel(x):\n    y = triton.language.rsqrt(x + 1)\n    z = triton.language.sqrt(y)\n")
    use_instructions(tree)
    text = ast.unparse(tree)
    assert f"inline_asm_elementwise('{INSTRUCTION} $0, $1;', '=f,f', [x + 1]" in text
    assert "triton.language.sqrt(y)" in text


def test_a_kernel_of_float32_has_the_instruction_and_no_library():
    shapes = [((4, 64), (64, 1)), ((1, 64), (0, 1)), ((4, 64), (64, 1))]
    operands = [{"dtype": "bfloat16", "shape": shape, "strides": strides} for shape, strides in shapes]
    program = rms_norm(torch.bfloat16).made_of() | {"instructions": True}  # tests run in the interpreter
    pool = Pool(1)
    try:
        (answer,) = pool.run([{"name": "norm", "capability": 90, "program": program, "operands": operands}])
    finally:
        pool.close()
    assert INSTRUCTION in answer["source"], answer
    assert base64.b64decode(answer["files"][".cubin"])[:4] == b"\x7fELF"


def test_float64_and_the_interpreter_keep_the_function():
    assert not rms_norm(torch.float64).made_of()["instructions"]
    assert not rms_norm(torch.float32).made_of()["instructions"]


def test_a_process_warms_up_without_an_error():
    subprocess.run([sys.executable, "-c", WARM, aot_worker.__file__], check=True, capture_output=True)


WARM = """
import runpy, sys
runpy.run_path(sys.argv[1], run_name="worker")["_warm_up"]()
"""
