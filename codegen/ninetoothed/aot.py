"""Compiling kernels for a GPU that is not there, and reading what the machine code is like.

Triton's wheel brings ptxas and a disassembler; `aot_worker` runs them in processes of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from graph_capture.codegen.ninetoothed.host import Built
from graph_capture.codegen.ninetoothed.workers import POOL
from graph_capture.errors import FusionError

_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Binary:
    """Machine code of one kernel.

    Attributes:
        sass: the disassembly.
        instructions: SASS instructions, padding left out.
        registers: registers a thread.
        stack: bytes of local memory a thread: spilled registers, and what sin and cos need for large arguments.
        shared: bytes of shared memory.
        loads, stores: global accesses by width in bits, ``{128: 4}``.
    """

    sass: str
    instructions: int
    registers: int
    stack: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]

    def to_json(self) -> str:
        """Everything as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Binary:
        """What `to_json` wrote."""
        table = json.loads(text)
        for name in ("loads", "stores"):
            table[name] = {int(width): count for width, count in table[name].items()}
        return cls(**table)


def capability_of(architecture: str) -> int:
    """90 for ``sm_90``.

    Raises:
        FusionError: the architecture's name is not of that form.
    """
    if not re.fullmatch(r"sm_\d{2,3}", architecture):
        raise FusionError(f"{architecture!r} is not an architecture such as 'sm_90'")
    return int(architecture[3:])


def compile_ahead(jobs: Sequence[Built], architecture: str) -> list[Binary]:
    """Compile programs for ``sm_NN``: contiguous operands, addresses and row sizes aligned.

    Raises:
        FusionError: the architecture's name is not of that form, or the compiler fails.
    """
    capability = capability_of(architecture)
    request = []
    for built in jobs:
        program = built.program
        operands = zip(program.dtypes, program.ranks, program.aligned, strict=True)
        request.append(
            {
                "file": built.triton_file,
                "kernel": built.kernel_name,
                "capability": capability,
                "warps": program.warps,
                "stages": program.stages,
                "operands": [
                    {"pointer": _POINTERS[dtype], "rank": rank, "aligned": aligned} for dtype, rank, aligned in operands
                ],
            }
        )
    return compile_jobs(request, architecture)


def compile_jobs(request: Sequence[Mapping[str, Any]], architecture: str) -> list[Binary]:
    """Compile what `aot_worker` takes, in a process for each core.

    Raises:
        FusionError: the compiler fails.
    """
    done = POOL.run(request)
    for answer in done:
        if "error" in answer:
            raise FusionError(f"compiling for {architecture} failed: {answer['error'].strip()[-2000:]}")
    return [_read(**answer) for answer in done]


def _read(*, sass: str, shared: int, usage: str) -> Binary:
    code = [line.split("\t")[-1].strip() for line in sass.splitlines() if line.rstrip().endswith(";")]
    code = [re.sub(r"^@!?U?P\w+\s+", "", line) for line in code]
    code = [line for line in code if not line.startswith("NOP")]
    widths: dict[str, dict[int, int]] = {"LDG": {}, "STG": {}}
    for line in code:
        for access, found in widths.items():
            if re.match(rf"{access}(STS)?\b", line):  # LDGSTS copies to shared memory
                width = re.search(r"\.(128|64|U?16|U?8|S16|S8)\b", line.split()[0])
                bits = int(re.sub(r"\D", "", width.group(1))) if width else 32
                found[bits] = found.get(bits, 0) + 1
    registers, stack = re.search(r"REG:(\d+)", usage), re.search(r"STACK:(\d+)", usage)
    return Binary(
        sass=sass,
        instructions=len(code),
        registers=int(registers.group(1)) if registers else 0,
        stack=int(stack.group(1)) if stack else 0,
        shared=shared,
        loads=widths["LDG"],
        stores=widths["STG"],
    )
