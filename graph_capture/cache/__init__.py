"""The cache folder, what its entries depend on, and a small store of files by key in it.

The folder is private to the user: what lies in it is loaded as machine code. Whatever goes wrong with it is worth one
warning and costs the cache, never the call.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from graph_capture.cache.machine import c_compiler, c_library, code_digest, package_version, processor, source_folders
from graph_capture.log import log

__all__ = ["DiskCache", "cache_folder", "environment", "environment_key", "source_folders", "workspace"]

VARIABLE = "GRAPH_CAPTURE_CACHE_DIR"
SIZE_VARIABLE = "GRAPH_CAPTURE_CACHE_SIZE"
DEFAULT_SIZE = 4 * 2**30  # bytes of all entries
ROOM = 2**24  # bytes that a temporary folder must have left
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
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
    private = _temporary("graph_capture_cache_", Path(tempfile.gettempdir()))
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


def size_limit() -> int:
    """The bytes that all entries may take, of which those that were used longest ago go first:
    ``GRAPH_CAPTURE_CACHE_SIZE`` (``2G``, ``500M``, ``0`` for no limit), or 4 GiB."""
    text = os.environ.get(SIZE_VARIABLE, "").strip()
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text, re.IGNORECASE | re.ASCII)
    if found is None:
        if text:
            warn_once(text, f"{SIZE_VARIABLE} is {text!r}, which is no size such as 500M or 2G; it is ignored")
        return DEFAULT_SIZE
    return int(float(found[1]) * _UNITS[found[2].upper()])


# --- temporary folders


def workspace() -> Path:
    """A private folder of this process for what is generated (ninetoothed's own cache is shared and not atomic).

    It is where temporary files go, or, where there is no room or nothing may be executed, in memory or the cache.

    Raises:
        OSError: there is no such place.
    """
    return _workspace(os.getpid(), tempfile.gettempdir())


@functools.cache
def _workspace(process: int, preferred: str) -> Path:
    tried = []
    for place in (Path(preferred), Path("/dev/shm"), Path("/var/tmp"), cache_folder()):
        try:
            status = os.statvfs(place)
            if status.f_flag & getattr(os, "ST_NOEXEC", 0) or status.f_bavail * status.f_frsize < ROOM:
                raise OSError("nothing may be executed there, or it is full")
            return _temporary("graph_capture_", place)
        except OSError as error:
            tried.append(f"{place}: {error}")
    raise OSError("no temporary folder can be used: " + "; ".join(tried))


def _temporary(prefix: str, place: Path) -> Path:
    """A folder that is removed when this process ends, or, if it is killed, by the next one that makes such a folder.

    A lock tells: it ends with the process, and with those that were forked from it.
    """
    for left in place.glob("graph_capture_*"):
        with contextlib.suppress(OSError), open(left / ".lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
    lock = os.open(path / ".new_lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(path / ".new_lock", path / ".lock")  # nobody sees it unlocked
    atexit.register(_remove, path, os.getpid())
    return path


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked child
        shutil.rmtree(folder, ignore_errors=True)


# --- what entries depend on


@functools.cache
def environment(device: str = "cpu") -> Mapping[str, str]:
    """What a kernel or a measurement depends on besides its own text: versions, this package's code, the processor or
    GPU that `device` names, and the C compiler."""
    return {
        **{name: package_version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "code": code_digest(),
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else processor(),
        "compiler": c_compiler(),
        "libc": c_library(),
    }


def environment_key(device: str | torch.device = "cpu") -> str:
    """`environment` as one string of 64 hex digits."""
    return _digest(json.dumps(environment(str(device)), sort_keys=True).encode())


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
            if _digest(_read_own(path)) != digest:
                return None
            with contextlib.suppress(OSError):
                os.utime(self._manifest(key))  # it was used now
            return path
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
            _evict(self.folder.parent, key, sum(map(len, files.values())))
        except OSError as error:
            warn_once(str(self.folder), f"cannot write into the cache {self.folder}: {error}; going on without it")
            return False
        return True

    def drop(self, key: str) -> None:
        """Remove an entry: it is whole, and of no use here."""
        for file in [self._manifest(key), *self.folder.glob(f"{_checked(key)}.*")]:
            with contextlib.suppress(OSError):
                file.unlink()

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


_known_sizes: dict[Path, int] = {}  # of cache folders, as far as this process has followed them
STALE = 3600  # seconds after which a file that was being written is left over


def _evict(folder: Path, newest: str, added: int) -> None:
    """Keep the entries of a cache folder within the limit, the one that was just added in any case."""
    limit = size_limit()
    known = _known_sizes.get(folder)
    if known is not None and (known + added <= limit or not limit):
        _known_sizes[folder] = known + added
        return
    entries: dict[tuple[Path, str], list[Path]] = {}
    sizes: dict[tuple[Path, str], int] = {}
    used: dict[tuple[Path, str], float] = {}
    for file, size in list(_files(folder)):
        with contextlib.suppress(OSError):
            if file.name.startswith(".new_") and time.time() - file.stat().st_mtime > STALE:
                file.unlink()
            if re.match(r"[0-9a-f]{64}\.", file.name):
                entry = file.parent, file.name[:64]
                entries.setdefault(entry, []).append(file)
                sizes[entry] = sizes.get(entry, 0) + size
                used[entry] = max(used.get(entry, 0.0), file.stat().st_mtime)
    total = sum(sizes.values())
    for entry in sorted(entries, key=lambda entry: used[entry]):
        if not limit or total <= limit:
            break
        if entry[1] != newest:
            for file in sorted(entries[entry], key=lambda file: file.suffix != ".json"):  # what names the others first
                with contextlib.suppress(OSError):
                    file.unlink()
            total -= sizes[entry]
    _known_sizes[folder] = total


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
    _known_sizes.pop(folder, None)
    return count, total
