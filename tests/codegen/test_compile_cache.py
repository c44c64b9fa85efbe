"""Kernels for CUDA, compiled side by side and kept on disk: everything but the launch, on a machine without a GPU."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from graph_capture import FusionConfig, fuse, record
from graph_capture.codegen.ninetoothed.workers import Pool
from tests.models import recorded, tiny_llama, token_ids

ROOT = Path(__file__).parent.parent.parent

# Another process, in which kernels are compiled as for a GPU (a stand-in of the architecture in `argv[2]`).
CHILD = """
import json, sys
import torch
from graph_capture.codegen import KernelCompiler
from graph_capture.codegen.ninetoothed import aot_worker
from graph_capture.codegen.ninetoothed import host
from graph_capture.codegen.ninetoothed import target
from graph_capture import OpNode, SubGraph
from graph_capture.cache import DiskCache
from graph_capture.ir.graph import TensorMeta

host.interpreted = target.interpreted = lambda: False
host.import_triton()
import triton
triton.runtime.driver.set_active(aot_worker.NoDevice(int(sys.argv[2])))
cache = DiskCache("kernels", sys.argv[1])
jobs, compiled = [], []
answers, triton_compile = host.POOL.answers, triton.compile
host.POOL.answers = lambda requests: (jobs.extend(request["name"] for request in requests), answers(requests))[1]
triton.compile = lambda *args, **kwargs: (compiled.append(args), triton_compile(*args, **kwargs))[1]

silu = SubGraph((OpNode("silu", ("x",), ("a",)), OpNode("mul", ("a", "y"), ("z",))), ("x", "y"), ("z",))
softmax = SubGraph((OpNode("softmax", ("x",), ("y",), {"dim": -1}),), ("x",), ("y",))
broken = SubGraph((OpNode("softmax", ("x",), ("y",), {"dim": 0}),), ("x",), ("y",))
cuda = torch.device("cuda")
row = TensorMeta((64, 256), (256, 1), torch.bfloat16, cuda)
empty = TensorMeta((0, 256), (256, 1), torch.bfloat16, cuda)
wanted = [(silu, (row, row), 0), (softmax, (row,), None), (broken, (row,), 0), (softmax, (empty,), 0)]
maker = KernelCompiler("ninetoothed", cache)
maker.prepare(wanted)
asked = len(jobs)

def ready(graph, *metas):
    target_, spec, key, name = maker._described(graph, metas)
    inputs = [torch.empty_strided(m.shape, m.stride, dtype=m.dtype, device="meta") for m in metas]
    jobs_ = [host.Job.of(*launch) for launch in target._launches(spec, name, [*inputs, *spec.allocate(inputs)], 0)]
    return all(host._stored(job, cache) is not None for job in jobs_)

found = [ready(silu, row, row), ready(softmax, row)]
seven = TensorMeta((7, 256), (256, 1), torch.bfloat16, cuda)
rows = ready(softmax, seven)
odd_row = TensorMeta((63, 255), (255, 1), torch.bfloat16, cuda)
odd = ready(silu, odd_row, odd_row)
KernelCompiler("ninetoothed", DiskCache("kernels", sys.argv[1] + "/both")).prepare(
    [(softmax, (row,), 0), (softmax, (seven,), 0), (silu, (row, row), 0), (silu, (odd_row, odd_row), 0)]
)
print(json.dumps({
    "jobs": asked, "both": jobs[asked:], "here": len(compiled), "ready": found, "rows": rows, "odd": odd,
    "imported": "ninetoothed" in sys.modules,
}))
"""


def child(cache, architecture=90):
    command = [sys.executable, "-c", CHILD, str(cache), str(architecture)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache that one process has filled, and what that found."""
    folder = tmp_path_factory.mktemp("filled")
    return folder, child(folder)


def test_kernels_are_compiled_by_workers_and_found_by_the_launch(filled):
    _, first = filled
    assert first["jobs"] > 2  # SwiGLU, and the candidates of softmax
    assert first["here"] == 0
    assert first["ready"] == [True, True]
    assert first["rows"]  # how many there are is the grid's matter alone
    softmax, *others = sorted(first["both"], key=lambda name: "softmax" not in name)
    assert "softmax" in softmax  # once for both numbers of rows
    assert len(others) == len(set(others)) + 1 == 2  # SwiGLU for each
    assert not first["odd"]  # where a condition looks at a size that is no multiple of 16, it is another kernel


def test_another_process_compiles_and_makes_nothing(filled):
    folder, _ = filled
    again = child(folder)
    assert (again["jobs"], again["here"], again["ready"]) == (0, 0, [True, True])
    assert not again["imported"]


def test_another_architecture_is_another_kernel(filled):
    folder, first = filled
    assert child(folder, 80)["jobs"] == first["jobs"]


def test_what_is_damaged_or_a_link_is_made_again(filled, tmp_path):
    folder, first = filled
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    files = sorted((tmp_path / "kernels").iterdir())
    assert {path.suffix for path in files} == {".cubin", ".json", ".py"}
    for number, path in enumerate(files):
        if number % 2:
            path.write_bytes(path.read_bytes()[:-20] + b"damaged")
        else:
            path.rename(path.with_suffix(".moved"))
            path.symlink_to(path.with_suffix(".moved"))
    again = child(tmp_path)
    assert again["jobs"] == first["jobs"]
    assert again["ready"] == [True, True]


MISSING = {"file": "/nowhere/at_all.py", "kernel": "k", "capability": 90, "warps": 1, "stages": 1, "operands": []}


def children(process):
    """The processes that one has started, by id; those that wait to be buried too."""
    return list(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))


def eventually(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_workers_outlive_failures():
    pool = Pool(1)
    answers = pool.run([MISSING, MISSING])
    assert all("No such file" in answer["error"] for answer in answers)
    server = pool._server._process.pid
    (worker,) = children(server)
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: not children(server))
    (third,) = pool.run([MISSING])  # by another process
    assert "No such file" in third["error"]
    assert len(children(server)) == 1
    pool._server._process.kill()
    pool._server._process.wait()
    (fourth,) = pool.run([MISSING])
    assert "No such file" in fourth["error"]
    assert pool._server._process.pid != server
    pool.close()
    assert pool.run([]) == []


def test_a_worker_that_dies_fails_its_job_alone():
    pool = Pool(2)
    pool.start()
    worker = pool._take()
    server = pool._server._process.pid
    worker.ask(MISSING)  # from here on it is the server's only child
    os.kill(children(server)[0], signal.SIGKILL)
    assert worker.ask(MISSING) == {"error": "the compiling process ended"}
    assert not worker.alive
    assert all("No such file" in answer["error"] for answer in pool.run([MISSING] * 3))
    eventually(lambda: 1 <= len(children(server)) <= 2)
    pool.close()


def test_other_settings_of_triton_need_other_workers(monkeypatch):
    pool = Pool(1)
    pool.run([MISSING])
    before = pool._server._process.pid
    monkeypatch.setenv("TRITON_PRINT_AUTOTUNING", "0")
    pool.run([MISSING])
    assert pool._server._process.pid != before
    pool.close()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_process_that_asked(how):
    code = f"""
import os
import signal
from graph_capture.codegen.ninetoothed.workers import Pool
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
pool = Pool(2)
pool.run([{MISSING!r}] * 2)
print(pool._server._process.pid, flush=True)
os.kill(os.getpid(), {int(how)})
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == -how
    server = int(done.stdout)

    def gone():
        try:
            return "(zombie)" in Path(f"/proc/{server}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return True

    eventually(gone)


# --- candidates


@pytest.mark.gpu
def test_a_warm_process_loads_what_a_cold_one_compiled(tmp_path):
    """Also that a chosen candidate is kept with its decision."""
    model, ids = tiny_llama(dtype=torch.bfloat16).cuda(), token_ids().cuda()
    graph = recorded(model, ids)
    config = FusionConfig(cache_dir=tmp_path)
    first, second = fuse(graph, config), fuse(graph, config)
    for cold, warm in zip(first.regions, second.regions, strict=True):
        assert warm.decision.choice == cold.decision.choice
        assert getattr(warm.kernel, "choice", 0) == cold.decision.choice
    assert list((tmp_path / "kernels").glob("*.cubin"))
    torch.testing.assert_close(second(input_ids=ids), first(input_ids=ids))


@pytest.mark.gpu
def test_every_candidate_computes_the_same(tmp_path):
    x, weight = torch.randn(37, 4096, device="cuda").bfloat16(), torch.randn(4096, device="cuda").bfloat16()
    with record(x, weight) as recording:
        recording.output(torch.nn.functional.rms_norm(x * 2, (4096,), weight, 1e-6))
    fused = fuse(recording.graph, FusionConfig(profile="always", cache_dir=tmp_path))
    (region,) = [region for region in fused.regions if region.kernel]
    outputs = region.kernel.spec.allocate([x, weight])
    kernels = region.kernel.candidates((x, weight, *outputs))
    assert 1 < len(kernels) <= 4
    for kernel in kernels:
        torch.testing.assert_close(kernel(x, weight)[0], fused(x, weight))
