"""A pytest plugin: the C target's kernels are compiled for aarch64 and run in an emulator, on the tests' own memory.

    make aarch64

Needs ``aarch64-linux-gnu-gcc`` and the package ``unicorn``. Kernels get Armv8's baseline: NEON, vectors of four floats.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import unicorn
from unicorn import arm64_const as arm64

from graph_capture.codegen.c import host as c_host
from graph_capture.codegen.c.host import Layout

COMPILER = "aarch64-linux-gnu-gcc"
PAGE = 4096
counts = Counter[str]()
STACK, RETURN = 2**32, 2**33  # addresses, far from the program and from this process's memory
STACK_BYTES = 2**20


def call(machine: unicorn.Uc, address: int, *arguments: int) -> int:
    """Run a function until it returns."""
    registers = (arm64.UC_ARM64_REG_X0, arm64.UC_ARM64_REG_X1, arm64.UC_ARM64_REG_X2, arm64.UC_ARM64_REG_X3)
    for register, argument in zip(registers, arguments, strict=False):
        machine.reg_write(register, argument)
    machine.reg_write(arm64.UC_ARM64_REG_SP, STACK + STACK_BYTES - 64)
    machine.reg_write(arm64.UC_ARM64_REG_LR, RETURN)
    machine.emu_start(address, RETURN)
    return int(machine.reg_read(arm64.UC_ARM64_REG_X0))


@functools.lru_cache(maxsize=16)
def _machine(library: Library) -> unicorn.Uc:
    """Few at a time: some hundred do not fit into a process."""
    made = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
    made.mem_map(STACK, STACK_BYTES)
    made.mem_map(RETURN, PAGE)
    made.reg_write(arm64.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # floating point is on
    made.reg_write(arm64.UC_ARM64_REG_TPIDR_EL0, RETURN + PAGE // 2)  # where the C library has errno
    library.load(made)
    return made


class Library:
    """Functions of a source, in a machine of their own."""

    def __init__(self, source: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            program = str(Path(folder, "program"))
            flags = [flag for flag in c_host.FLAGS if flag not in ("-shared", "-fPIC")]
            text = f"{source}\nint main(void) {{ return 0; }}\n"
            line = [COMPILER, *flags, "-static", "-x", "c", "-", "-o", program, "-lm"]
            subprocess.run(line, input=text, text=True, check=True, stderr=subprocess.PIPE)
            listed = subprocess.run(["aarch64-linux-gnu-nm", program], capture_output=True, text=True, check=True)
            image = Path(program).read_bytes()
        self.symbols = {
            parts[2]: int(parts[0], 16) for row in listed.stdout.splitlines() if len(parts := row.split()) == 3
        }
        self.image = image

    @property
    def machine(self) -> unicorn.Uc:
        """A machine with the program in it."""
        return _machine(self)

    def load(self, machine: unicorn.Uc) -> None:
        """Put the program into a new machine."""
        image = self.image
        start, _, _, _, size, count = struct.unpack_from("<QQIHHH", image, 32)
        mapped: set[int] = set()
        for number in range(count):
            kind, _, offset, address, _, filed, bytes_, _ = struct.unpack_from(
                "<IIQQQQQQ", image, start + number * size
            )
            if kind != 1:
                continue
            for page in range(address // PAGE, (address + bytes_ - 1) // PAGE + 1):
                if page not in mapped:
                    machine.mem_map(page * PAGE, PAGE)
                    mapped.add(page)
            machine.mem_write(address, image[offset : offset + filed])
        first, last = (self.symbols.get(f"__rela_iplt_{end}", 0) for end in ("start", "end"))
        for entry in range(first, last, 24):  # the C library chooses its own functions by the processor
            place, _, resolver = struct.unpack("<QQQ", machine.mem_read(entry, 24))
            machine.mem_write(place, struct.pack("<Q", call(machine, resolver, 0)))

    def run(self, address: int, memory: Sequence[tuple[int, int]], *arguments: int) -> None:
        """Run a function with pieces of this process's memory, (address, bytes), where they are."""
        pages = sorted({page for start, size in memory for page in range(start // PAGE, (start + size) // PAGE + 1)})
        machine = self.machine
        for page in pages:
            machine.mem_map_ptr(page * PAGE, PAGE, unicorn.UC_PROT_READ | unicorn.UC_PROT_WRITE, page * PAGE)
        try:
            call(machine, address, *arguments)
        finally:
            for page in pages:
                machine.mem_unmap(page * PAGE, PAGE)

    def __getattr__(self, name: str) -> tuple[Library, int]:
        if name not in self.symbols:
            raise AttributeError(name)
        return self, self.symbols[name]


class Launch:
    """What `c_host.launch` gives, in the emulator."""

    def __init__(
        self, parts: Sequence[tuple[Library, int]], tensors: Sequence[torch.Tensor], layouts: Sequence[Layout]
    ) -> None:
        shared = torch.empty(sum(layout.scratch for layout in layouts))
        given = (*tensors, shared)
        self.parts, self.layouts = parts, layouts
        self.base = [tensor.data_ptr() for tensor in given]
        self.memory = [
            (t.untyped_storage().data_ptr() - t.data_ptr(), t.untyped_storage().nbytes()) for t in given
        ]  # where a tensor's storage begins, from its address, and its bytes
        self.operands = [(ctypes.c_void_p * len(layout.operands))() for layout in layouts]
        self.numbers = [(ctypes.c_int64 * len(layout.numbers))(*layout.numbers) for layout in layouts]
        self.held = (*self.operands, shared)
        self._place()

    def _place(self) -> None:
        for array, layout in zip(self.operands, self.layouts, strict=True):
            array[:] = [self.base[index] + offset for index, offset in layout.operands]

    def move(self, tensor: int, address: int) -> None:
        self.base[tensor] = address
        self._place()

    def join(self, others: Sequence[Launch]) -> Callable[[], None]:
        return chain([self, *others])

    def __call__(self) -> None:
        places = [(base + before, size) for base, (before, size) in zip(self.base, self.memory, strict=True) if size]
        for (library, address), *arrays, layout in zip(
            self.parts, self.operands, self.numbers, self.layouts, strict=True
        ):
            counts["launches"] += 1
            pointers = [ctypes.addressof(array) for array in arrays]
            sizes = [ctypes.sizeof(array) for array in arrays]
            library.run(address, [*places, *zip(pointers, sizes, strict=True)], *pointers, 0, layout.units)


def chain(launches: Sequence[Launch]) -> Callable[[], None]:
    """Several launches, in order."""

    def run() -> None:
        for launch in launches:
            launch()

    return run


@functools.cache
def library(text: str) -> Library:
    """A kernel's text, compiled and loaded."""
    counts["kernels"] += 1
    return Library(c_host.prelude() + text)


def pytest_configure(config: pytest.Config) -> None:
    """Put the emulator in the place of the machine."""
    os.environ["GRAPH_CAPTURE_CACHE_DIR"] = tempfile.mkdtemp()
    c_host.library = lambda text, cache=None: library(text)  # type: ignore[assignment, return-value]
    c_host.compile_ahead = lambda texts, cache=None: None
    c_host.launch = Launch  # type: ignore[assignment, misc]
    c_host.chain = chain  # type: ignore[assignment]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say that it was used."""
    terminalreporter.write_line(f"on aarch64: {counts['kernels']} kernels, {counts['launches']} launches")
