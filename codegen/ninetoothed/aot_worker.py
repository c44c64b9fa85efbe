"""Making and compiling kernels with ninetoothed and Triton alone; as a script, workers for another process.

The script's standard input is a socket. For each socket that comes through it, it forks a worker, which reads jobs from
there and writes results there, each a line of JSON, in turn. Both end with their input, or when nothing has come for
`PATIENCE`; the script no sooner than its workers. Being processes of their own they compile also where Triton's
interpreter has run, which leaves the language module patched. Imports neither the package nor torch, to start fast, and
nothing that has threads, which a fork would lose.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import functools
import gc
import hashlib
import importlib.util
import itertools
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

PATIENCE = 60  # seconds without a job
_numbers = itertools.count()


class NoDevice:
    """What ninetoothed and Triton ask of the active driver, on a machine that has none."""

    def __init__(self, capability: int = 90) -> None:
        self.capability = capability

    class utils:  # noqa: N801
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_num_regs": 65536, "max_shared_mem": 232448}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_device_interface(self) -> Any:
        import torch

        return torch.cpu

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")


# --- ninetoothed: from an arrangement and an application to Triton's language


def load_source(name: str, source: str, folder: Path) -> Any:
    """Import `source` from a file of its own in `folder`: ninetoothed and Triton read it back."""
    path = folder / f"{name}_{next(_numbers)}.py"
    path.write_text(source, encoding="utf-8")
    return _load_file(f"graph_capture_generated.{name}", path)


def _load_file(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def _rewriting(name: str) -> Any:
    """A module of the folder `triton_source`, without the package around it."""
    package = types.ModuleType("graph_capture_triton_source")
    package.__path__ = [str(Path(__file__).with_name("triton_source"))]
    sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(f"{package.__name__}.{name}")


def make(
    name: str,
    source: str,
    ranks: Sequence[int],
    other: float | None,
    warps: int,
    stages: int,
    overlapped: bool,
    light: bool,
    folder: Path,
) -> tuple[Callable[..., Any], str]:
    """Have ninetoothed make a kernel of a module; its launch function, and the file of Triton source behind it.

    The source depends on the arguments alone (ninetoothed numbers tensors as long as a process lives, here from 0), and
    says each thing once.
    """
    import ninetoothed
    from ninetoothed import generation

    jit: Any = sys.modules["ninetoothed.jit"]
    module = load_source(name, source, folder)
    before = generation.CACHE_DIR, ninetoothed.Tensor.num_instances, jit.import_from_path
    generation.CACHE_DIR, ninetoothed.Tensor.num_instances = folder, 0  # its own folder is shared, and not atomic
    # What it has written is read, simplified and imported below, so that it need not do so.
    jit.import_from_path = lambda *_: types.SimpleNamespace(**dict.fromkeys((name, f"launch_{name}")))
    try:
        handle = ninetoothed.make(
            module.arrangement,
            module.application,
            tuple(ninetoothed.Tensor(rank, other=other) for rank in ranks),
            kernel_name=name,
            num_warps=warps,
            num_stages=stages,
        )
    finally:
        generation.CACHE_DIR, jit.import_from_path = before[0], before[2]
        ninetoothed.Tensor.num_instances = max(before[1], ninetoothed.Tensor.num_instances)
    tree = ast.parse(Path(handle._source).read_text("utf-8"))
    _rewriting("simplify").simplify(tree)
    if overlapped and hasattr(triton.language.extra.cuda, "gdc_wait"):  # Triton 3.4
        _rewriting("overlap").overlap(tree, light)
    simplified = load_source(name, ast.unparse(tree) + "\n", folder)
    return getattr(simplified, f"launch_{name}"), simplified.__file__


# --- Triton: compiling for given operands without a launch


@dataclass(frozen=True)
class Mock:
    """Stands for a tensor that a kernel is compiled for: ``bfloat16``, sizes, strides, whether 16-byte aligned."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    aligned: bool = True

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def stride(self, dim: int) -> int:
        return self.strides[dim]

    def data_ptr(self) -> int:
        return 0 if self.aligned else self.itemsize

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return 1 if self.dtype == "bool" else int(re.sub(r"\D", "", self.dtype)) // 8


class _Dry:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.made = kernel, None

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> None:
            self.made = self.kernel.warmup(*args, grid=grid, **kwargs)

        return call


def compile_launch(launch: Callable[..., Any], name: str, operands: Sequence[Any]) -> Any:
    """Have Triton compile what `launch` would launch on `operands`, tensors or mocks; its compiled kernel."""
    dry = _Dry(launch.__globals__[name])
    # A copy: somebody else may launch the kernel meanwhile.
    types.FunctionType(launch.__code__, {**launch.__globals__, name: dry})(*operands)
    return dry.made


def compile_with(kernel: Any, function: Callable[..., Any]) -> None:
    """Have Triton call `function(src, target, options)` when `kernel`, a JITFunction, is to be compiled."""

    def create_binder() -> Any:
        made = kernel.__class__.create_binder(kernel)  # sets `compile`
        kernel.compile = lambda src, *, target, options, **_: function(src, target, options)
        return made

    kernel.device_caches = defaultdict(create_binder)


def digest(src: Any, target: Any, options: Mapping[str, Any]) -> str:
    """What Triton compiles a source for: types, constants, alignments, target, options."""
    parts = (list(src.signature.items()), sorted(src.constants.items()), sorted(src.attrs.items()), vars(target))
    return hashlib.sha256(repr((*parts, sorted(options.items()))).encode()).hexdigest()


# --- jobs


def compile_job(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Do one job, as `graph_capture.codegen` writes them; files that are made go into `folder`."""
    return _compile_program(job, folder) if "program" in job else _compile_file(job)


def _compile_program(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Make a program and compile it for given operands: its source, and Triton's files of the kernel."""
    triton.runtime.driver.set_active(NoDevice(job["capability"]))
    name = job["name"]
    launch, file = make(name, folder=folder, **job["program"])
    found: dict[str, Any] = {"source": Path(file).read_text(encoding="utf-8")}

    def compiled(src: Any, target: Any, options: Mapping[str, Any]) -> Any:
        result = triton.compile(
            src, target=target, options=options | _rewriting("libdevice").without(found["source"], folder)
        )
        paths = map(Path, result.metadata_group.values())
        files = {path.suffix: base64.b64encode(path.read_bytes()).decode() for path in paths}
        found.update(digest=digest(src, target, options), files={name: files[name] for name in (".json", ".cubin")})
        return result

    compile_with(launch.__globals__[name], compiled)
    compile_launch(launch, name, [Mock(**operand) for operand in job["operands"]])
    if "digest" not in found:
        raise RuntimeError(f"Triton {triton.__version__} compiles in another way")
    return found


def _compile_file(job: Mapping[str, Any]) -> dict[str, Any]:
    """Compile a kernel in a file; its machine code as text, and what it uses."""
    function = getattr(_load_file("generated", Path(job["file"])), job["kernel"])
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


def _arguments(function: Any, job: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, int], dict[tuple[int], Any]]:
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


def _number(argument: str) -> int:
    match = re.search(r"_tensor_(\d+)_(?:pointer|size|stride)", argument)
    assert match is not None, argument
    return int(match.group(1))


# --- processes


# What is imported, loaded and cached for a first kernel need not be so by each worker.
_SAMPLE = """import ninetoothed.language as ntl


def arrangement(x, y):
    return x.tile((1, 64)), y.tile((1, 64))


def application(x, y):
    y = ntl.exp(x - ntl.max(x, axis=1, keep_dims=True))
"""


@contextlib.contextmanager
def _workplace() -> Iterator[Path]:
    """A folder for what is made, and Triton set up to compile once and keep nothing."""
    with tempfile.TemporaryDirectory(prefix="graph_capture_worker_") as folder:
        os.environ["TRITON_CACHE_DIR"] = str(Path(folder, "triton"))
        os.environ["TRITON_STORE_BINARY_ONLY"] = "1"  # not what lies between source and machine code
        os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")  # of files that end with this process
        # Triton's own cache is new and goes with this process: its keys, digests of half a gigabyte, are of no use.
        triton.runtime.cache.triton_key = triton.compiler.compiler.triton_key = functools.cache(lambda: "")
        yield Path(folder)


def _warm_up() -> None:
    """Compile a kernel."""
    operands = [{"dtype": "bfloat16", "shape": (4, 64), "strides": (64, 1)}] * 2
    settings = {"ranks": (2, 2), "other": None, "warps": 1, "stages": 1, "overlapped": True, "light": True}
    job = {"name": "sample", "capability": 90, "program": {"source": _SAMPLE, **settings}, "operands": operands}
    with _workplace() as folder:
        compile_job(job, folder)


def _serve(control: socket.socket) -> None:
    """Fork a worker for each connection that comes."""
    with contextlib.suppress(Exception):  # a job says so
        _warm_up()
    gc.freeze()  # what is imported is not looked through, or copied, by each worker
    gc.disable()

    def reap(*_: object) -> bool:
        """Bury workers that have ended; whether others live."""
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            return True
        return False

    signal.signal(signal.SIGCHLD, reap)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the process that asks
    while select.select([control], [], [], PATIENCE)[0] or reap():
        if not select.select([control], [], [], 0)[0]:
            continue
        message, descriptors, *_ = socket.recv_fds(control, 1, 1)
        if not message:
            break
        for descriptor in descriptors:
            if os.fork() == 0:
                control.close()
                _work(socket.socket(fileno=descriptor))
            os.close(descriptor)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def _work(connection: socket.socket) -> NoReturn:
    """Do jobs until there are no more."""
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with _workplace() as folder:
            lines = connection.makefile("rw", encoding="utf-8")
            while select.select([connection], [], [], PATIENCE)[0] and (line := lines.readline()):
                try:
                    answer = compile_job(json.loads(line), folder)
                except BaseException:
                    answer = {"error": traceback.format_exc()}
                print(json.dumps(answer), file=lines, flush=True)
                if not select.select([connection], [], [], 0.1)[0]:
                    gc.collect()  # now that nobody waits
        status = 0
    finally:
        os._exit(status)


if __name__ == "__main__":
    _serve(socket.socket(fileno=0))
    os._exit(0)  # nothing is worth tearing down
