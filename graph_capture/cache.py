"""The cache folder, what its entries depend on, and a small store of files by key in it.

The folder is private to the user: what lies in it is loaded as machine code. Whatever goes wrong with it is worth one
warning and costs the cache, never the call.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from graph_capture.log import log

VARIABLE = "GRAPH_CAPTURE_CACHE_DIR"
_PACKAGES = ("graph-capture", "torch", "triton", "ninetoothed")
_warned: set[str] = set()


def warn_once(what: str, message: str) -> None:
    """Log `message` as a warning, unless one about `what` was logged before."""
    if what not in _warned:
        _warned.add(what)
        log.warning("%s", message)


def cache_folder(chosen: str | os.PathLike[str] | None = None) -> Path:
    """The cache folder, made where it is missing (mode 0700).

    It is `chosen`, or what ``GRAPH_CAPTURE_CACHE_DIR`` says, or platformdirs' cache folder of the user. Where that
    cannot be made, belongs to somebody else, or can be written by others, it is a temporary one of this process, with
    one warning.
    """
    if chosen is None:
        chosen = os.environ.get(VARIABLE) or None
    if chosen is None:
        from platformdirs import user_cache_dir

        chosen = user_cache_dir("graph_capture")
    return _usable(Path(os.path.abspath(os.path.expanduser(chosen))), os.getpid())


@functools.cache
def _usable(folder: Path, process: int) -> Path:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        reason = _unsafe(os.stat(folder))
    except OSError as error:
        reason = str(error)
    if reason is None:
        return folder
    private = Path(tempfile.mkdtemp(prefix="graph_capture_cache_"))
    atexit.register(_remove, private, process)
    warn_once(str(folder), f"the cache folder {folder} is not used ({reason}); this process keeps its own in {private}")
    return private


def _unsafe(status: os.stat_result) -> str | None:
    if not stat.S_ISDIR(status.st_mode):
        return "it is not a folder"
    if not hasattr(os, "geteuid"):
        return None
    if status.st_uid != os.geteuid():
        return "it belongs to another user"
    return "others can write into it" if status.st_mode & 0o022 else None


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked child
        shutil.rmtree(folder, ignore_errors=True)


# --- what entries depend on


@functools.cache
def environment(device: str = "cpu") -> Mapping[str, str]:
    """What a kernel or a measurement depends on besides its own text: versions, this package's code, the processor or
    GPU that `device` names, and the C compiler."""
    return {
        **{name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "code": code_digest(),
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else _processor(),
        "compiler": _compiler(),
    }


def environment_key(device: str | torch.device = "cpu") -> str:
    """`environment` as one string of 64 hex digits."""
    return _digest(json.dumps(environment(str(device)), sort_keys=True).encode())


def _version(name: str) -> str:
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
    found = [Path(__file__).parent]
    for name in ("passes", "codegen", "runtime"):
        spec = importlib.util.find_spec(f"graph_capture.{name}")
        found += map(Path, (spec.submodule_search_locations or ()) if spec is not None else ())
    return tuple(found)


def _processor() -> str:
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
    return f"{model} ({_digest(features.encode())[:16]})"


def _compiler() -> str:
    command = os.environ.get("CC", "cc")
    try:
        done = subprocess.run([command, "--version"], capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.partition("\n")[0]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- files by key


class DiskCache:
    """Files by key in one folder, for many processes at once.

    An entry is a manifest that names its files with their digests. The files come first and have their digests in their
    names, everything is moved into place by `os.replace`: whoever reads sees a whole entry or none, whatever process
    was killed where. An entry that is damaged, or that another user wrote, is not there.

    Args:
        kind: the name of the folder inside the cache folder.
        folder: the cache folder; see `cache_folder`.
    """

    def __init__(self, kind: str, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = cache_folder(folder) / kind

    @staticmethod
    def key(*parts: str, device: str | torch.device = "cpu") -> str:
        """A key (64 hex digits) of what an entry is made from (source, target, flags) and of `environment`."""
        return _digest("\0".join((*parts, environment_key(device))).encode())

    def get(self, key: str, suffix: str) -> Path | None:
        """The file with this suffix (``.so``), its content checked; None where there is none."""
        try:
            files = json.loads(_read_own(self._manifest(key)))
            digest = files[suffix]
            path = self._file(key, digest, suffix)
            return path if _digest(_read_own(path)) == digest else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def read(self, key: str, suffix: str) -> bytes | None:
        """What `get` finds, as bytes."""
        path = self.get(key, suffix)
        try:
            return None if path is None else path.read_bytes()
        except OSError:
            return None

    def put(self, key: str, files: Mapping[str, bytes]) -> bool:
        """Keep `files` (suffix -> content) as the entry `key`; False, with one warning, where that cannot be done."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            digests = {suffix: _digest(data) for suffix, data in files.items()}
            for suffix, data in files.items():
                _write(self._file(key, digests[suffix], suffix), data)
            _write(self._manifest(key), json.dumps(digests).encode())
        except OSError as error:
            warn_once(str(self.folder), f"cannot write into the cache {self.folder}: {error}; going on without it")
            return False
        return True

    def _manifest(self, key: str) -> Path:
        return self.folder / f"{_checked(key)}.json"

    def _file(self, key: str, digest: str, suffix: str) -> Path:
        return self.folder / f"{_checked(key)}.{_checked(digest)[:16]}{suffix}"


def _checked(name: str) -> str:
    if not isinstance(name, str) or not name.isalnum():
        raise ValueError(f"{name!r} is not a key")
    return name


def _read_own(path: Path) -> bytes:
    """The content of a regular file of this user.

    Raises:
        OSError: it cannot be read, is a link, or somebody else's.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or (hasattr(os, "geteuid") and status.st_uid != os.geteuid()):
            raise PermissionError(f"{path} is not this user's file")
        return file.read()


def _write(path: Path, data: bytes) -> None:
    """Write a file that is there as a whole or not at all."""
    descriptor, name = tempfile.mkstemp(prefix=".new_", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        if path.suffix == ".so":
            os.chmod(name, 0o700)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


# --- the folder as a whole

_OURS = re.compile(r"[0-9a-f]{64}(\.[0-9a-f]{16})?\.\w+|\.new_\w+|decisions-\d+\.(sqlite(-wal|-shm)?|lock|damaged)")


def _files(folder: Path) -> Iterator[tuple[Path, int]]:
    """The cache's files in `folder`, with their bytes; nobody else's."""
    for file in [*folder.glob("*"), *folder.glob("*/*")]:
        with contextlib.suppress(OSError):  # removed meanwhile
            status = file.lstat()
            if stat.S_ISREG(status.st_mode) and _OURS.fullmatch(file.name):
                yield file, status.st_size


class Usage(NamedTuple):
    """What one kind of thing takes: entries, files, bytes."""

    entries: int = 0
    files: int = 0
    bytes: int = 0


def contents(folder: Path) -> dict[str, Usage]:
    """What the cache folder holds, by kind (``kernels``); the entries of a database are not counted."""
    found: dict[str, Usage] = {}
    for file, size in _files(folder):
        kind = "decisions" if file.parent == folder else file.parent.name
        before = found.get(kind, Usage())
        entry = re.fullmatch(r"[0-9a-f]{64}\.json", file.name) is not None
        found[kind] = Usage(before.entries + entry, before.files + 1, before.bytes + size)
    return found


def clear(folder: Path) -> tuple[int, int]:
    """Remove everything that this package keeps in the folder; how many files that were, and their bytes."""
    count = total = 0
    for file, size in list(_files(folder)):
        with contextlib.suppress(OSError):
            file.unlink()
            count, total = count + 1, total + size
    return count, total


@functools.cache
def workspace() -> Path:
    """A private folder of this process for generated sources (ninetoothed's own cache is shared and not atomic)."""
    path = Path(tempfile.mkdtemp(prefix="graph_capture_"))
    atexit.register(_remove, path, os.getpid())
    return path
