"""What code that is kept for later was made with: versions, sources, processor, compiler, C library."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


@functools.cache
def code_digest() -> str:
    """A digest of this package's sources: what older code has left in the cache is not used."""
    digest = hashlib.sha256()
    folders = source_folders()
    for file in sorted({file for folder in folders for file in folder.rglob("*.py")}):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def source_folders() -> tuple[Path, ...]:
    """The folders of this package's sources: in a checkout some subpackages lie beside it, not in it."""
    found = [Path(__file__).parent.parent]
    for name in ("passes", "codegen", "runtime"):
        spec = importlib.util.find_spec(f"graph_capture.{name}")
        found += map(Path, (spec.submodule_search_locations or ()) if spec is not None else ())
    return tuple(found)


def processor() -> str:
    """The processor's model and what it can do, for code is compiled for exactly this one."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            text = file.read(8192)  # one processor: the others cost time
    except OSError:
        return platform.processor() or platform.machine()
    lines = [line.partition(":") for line in text.partition("\n\n")[0].splitlines()]
    known = {name.strip(): value.strip() for name, _, value in lines}
    features = known.get("flags") or known.get("Features", "")
    model = known.get("model name") or platform.machine()
    return f"{model} ({hashlib.sha256(features.encode()).hexdigest()[:16]})"


def c_compiler() -> str:
    command = os.environ.get("CC", "cc")
    try:
        done = subprocess.run([command, "--version"], capture_output=True, check=False, timeout=10)
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace").partition("\n")[0]


def c_library() -> str:
    """The C library and the loader that compiled kernels are loaded by."""
    try:
        name = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, OSError, ValueError):
        name = ""
    with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        files = {line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")}
        loaders = sorted(file for file in files if re.match(r"ld[-.]", os.path.basename(file)))
        name += "".join(f" {file} {os.path.getsize(file)}" for file in loaders if os.path.exists(file))
    return name or "-".join(platform.libc_ver())
