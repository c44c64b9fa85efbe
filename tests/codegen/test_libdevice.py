"""Kernels that are compiled without libdevice, and the one that compiling processes warm up with."""

import json
import os
import subprocess
import sys

import pytest
import torch

from graph_capture import KernelCompiler, OpNode, SubGraph
from graph_capture.codegen.ninetoothed import aot_worker
from graph_capture.codegen.ninetoothed import rows as ninetoothed_rows
from graph_capture.codegen.ninetoothed.triton_source.libdevice import without


@pytest.mark.parametrize(
    ("calls", "needs"),
    [
        (["load", "rsqrt", "sum", "store"], False),
        (["load", "rsqrt", "cast", "float64"], True),
        (["rsqrt", "math.tanh"], True),
        (["rsqrt", "cos"], True),
    ],
)
def test_what_needs_the_library(calls, needs, tmp_path):
    source = "\n".join(f"    x = triton.language.{call}(x)" for call in calls)
    assert (without(source, tmp_path) == {}) == needs
    assert (tmp_path / "libdevice.ll").exists() != needs


def test_what_calls_nothing_of_it_has_no_options(tmp_path):
    assert without("x = triton.language.exp(x)", tmp_path) == {}


BOTH_WAYS = """
import base64, json, runpy, subprocess, sys, types
from pathlib import Path
worker = types.SimpleNamespace(**runpy.run_path(sys.argv[1], run_name="worker"))
job, codes = json.loads(sys.argv[2]), []
with worker._workplace() as folder:
    for plain in (worker._rewriting("libdevice").PLAIN, frozenset()):
        worker._rewriting("libdevice").PLAIN = plain
        (folder / "norm.cubin").write_bytes(base64.b64decode(worker.compile_job(job, folder)["files"][".cubin"]))
        command = [worker.triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", folder / "norm.cubin"]
        codes.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert (folder / "libdevice.ll").exists() == bool(plain)
        (folder / "libdevice.ll").unlink(missing_ok=True)
        worker.triton.runtime.cache.triton_key = worker.triton.compiler.compiler.triton_key = lambda: "again"
print(json.dumps(codes))
"""


@pytest.mark.parametrize("columns", [64, 4096])
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_the_machine_code_is_the_same(name, columns):
    graph = SubGraph((OpNode(name, ("x", "w"), ("y",), {"eps": 1e-6}),), ("x", "w"), ("y",))
    kernel = KernelCompiler("ninetoothed").compile(graph, [torch.bfloat16] * 2, [(4, columns), (columns,)])
    program = ninetoothed_rows.program(kernel.spec, interpreted=False).made_of()
    shapes = [((4, columns), (columns, 1)), ((1, columns), (0, 1)), ((4, columns), (columns, 1))]
    operands = [{"dtype": "bfloat16", "shape": shape, "strides": strides} for shape, strides in shapes]
    job = json.dumps({"name": "norm", "capability": 90, "program": program, "operands": operands})
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", BOTH_WAYS, aot_worker.__file__, job]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    first, second = json.loads(done.stdout.splitlines()[0])
    assert first == second
    assert "MUFU.RSQ" in first


def test_a_process_warms_up_without_an_error():
    program = 'import runpy, sys; runpy.run_path(sys.argv[1], run_name="worker")["_warm_up"]()'
    subprocess.run([sys.executable, "-c", program, aot_worker.__file__], check=True, capture_output=True)
