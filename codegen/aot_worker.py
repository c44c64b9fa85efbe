"""Compiles kernels with Triton alone: a list of jobs as JSON on standard input, results as JSON on the last line out.

Run as a script by `graph_capture.codegen.aot`, in a process of its own: where Triton's interpreter has run, its
language module stays patched and compiles no more. Imports nothing of the package, so that it starts fast.
"""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def _number(argument: str) -> int:
    match = re.search(r"_tensor_(\d+)_(?:pointer|size|stride)", argument)
    assert match is not None, argument
    return int(match.group(1))


def compile_job(job: dict[str, Any]) -> dict[str, Any]:
    """Compile one kernel; `job` and the result are as `graph_capture.codegen.aot` writes and reads them."""
    spec = importlib.util.spec_from_file_location("generated", job["file"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, job["kernel"])
    compiled = triton.compile(
        ASTSource(function, *_arguments(function, job)),
        target=GPUTarget("cuda", job["capability"], 32),
        options={"num_warps": job["warps"], "num_stages": job["stages"]},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {"sass": compiled.asm["sass"], "shared": compiled.metadata.shared, "usage": usage}


def _arguments(function: Any, job: dict[str, Any]) -> tuple[dict[str, str], dict[str, int], dict[tuple[int], Any]]:
    """The types of a kernel's arguments, those that are constant, and what is known of the others."""
    signature: dict[str, str] = {}
    constants: dict[str, int] = {}
    attributes: dict[tuple[int], Any] = {}
    if "arguments" in job:  # written by hand: a type or a constant for each
        for index, (name, argument) in enumerate(job["arguments"].items()):
            if isinstance(argument, str):
                signature[name] = argument
                attributes[(index,)] = [["tt.divisibility", 16]] if argument != "fp32" else []
            else:
                signature[name], constants[name] = "constexpr", argument
        return signature, constants, attributes
    # The arguments are sorted as text (tensor_100 before tensor_99), the tensors numbered in the order of the operands.
    tensors = sorted({_number(name) for name in function.arg_names})
    operands = dict(zip(tensors, job["operands"], strict=True))
    for index, name in enumerate(function.arg_names):
        operand = operands[_number(name)]
        if name.endswith("_pointer"):
            signature[name] = operand["pointer"]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name.endswith(f"_stride_{operand['rank'] - 1}"):  # contiguous
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32"
            if operand["aligned"] and (operand["rank"] == 1 or "_stride_" in name):
                attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


if __name__ == "__main__":
    print(json.dumps([compile_job(job) for job in json.load(sys.stdin)]))
