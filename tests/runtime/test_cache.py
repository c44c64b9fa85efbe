"""A cache folder that heals, compilers that do not answer or lie, folders that killed processes left, interrupts."""

import gc
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from graph_capture import FusionConfig, FusionError, capture
from graph_capture import cache as folders
from graph_capture.cache import DiskCache, environment, size_limit, workspace
from graph_capture.cache.machine import c_library
from graph_capture.codegen.c import compiler_process, host
from graph_capture.runtime.replay.memory import Memory
from tests.beside_eager import always, fused_of, on_the_cpu, rand, same

pytestmark = on_the_cpu
CHAIN = "void kernel(void *const *operands, const int64_t *geometry, int64_t begin, int64_t end) {}\n"


def gated(x):
    return F.silu(x) * x


def entries(folder):
    return sorted(file.name for file in folder.glob("*/*.json"))


# --- entries


def test_an_entry_that_does_not_load_is_dropped_and_made_again(tmp_path):
    cache = DiskCache("kernels", tmp_path)
    text = CHAIN.replace("kernel", "first")
    host.library(text, cache)
    gc.collect()
    chosen = host.toolchain(cache)
    key = DiskCache.key(host.prelude() + text, *chosen.command, chosen.version, *chosen.flags)
    cache.put(key, {".so": b"\x7fELF of another machine"})  # whole, by its digest
    gc.collect()
    assert host.library(text, cache).first is not None
    assert cache.read(key, ".so")[:4] == b"\x7fELF"
    assert len(cache.read(key, ".so")) > 1000


def test_drop_removes_an_entry_and_no_other(tmp_path):
    cache = DiskCache("kernels", tmp_path)
    for key in ("a" * 64, "b" * 64):
        cache.put(key, {".so": b"x", ".json": b"y"})
    cache.drop("a" * 64)
    assert cache.read("a" * 64, ".so") is None
    assert cache.read("b" * 64, ".so") == b"x"


def test_what_was_used_longest_ago_goes_first(tmp_path, monkeypatch):
    monkeypatch.setenv(folders.SIZE_VARIABLE, "40K")
    cache = DiskCache("kernels", tmp_path)
    keys = [letter * 64 for letter in "abcdef"]
    for number, key in enumerate(keys[:3]):
        cache.put(key, {".so": bytes(12_000)})
        os.utime(cache._manifest(key), (1000 + number, 1000 + number))
        for file in tmp_path.glob(f"kernels/{key}.*.so"):
            os.utime(file, (1000 + number, 1000 + number))
    assert cache.get(keys[0], ".so") is not None  # which is a use
    for key in keys[3:5]:
        cache.put(key, {".so": bytes(12_000)})
    there = [key for key in keys if cache.read(key, ".so") is not None]
    assert there == [keys[0], keys[3], keys[4]]
    assert sum(file.stat().st_size for file in tmp_path.glob("kernels/*")) <= 40 * 1024


def test_an_entry_beyond_the_limit_is_alone(tmp_path, monkeypatch):
    monkeypatch.setenv(folders.SIZE_VARIABLE, "10K")
    cache = DiskCache("kernels", tmp_path)
    cache.put("a" * 64, {".so": bytes(8000)})
    cache.put("b" * 64, {".so": bytes(20_000)})
    assert cache.read("a" * 64, ".so") is None
    assert len(cache.read("b" * 64, ".so")) == 20_000


@pytest.mark.parametrize(
    ("text", "size"), [("500M", 500 * 2**20), ("2g", 2 * 2**30), ("1.5 KiB", 1536), ("0", 0), ("12", 12), ("", 2**32)]
)
def test_sizes(text, size, monkeypatch):
    monkeypatch.setenv(folders.SIZE_VARIABLE, text)
    assert size_limit() == size


def test_a_size_that_is_none_is_told_once(monkeypatch, caplog):
    monkeypatch.setattr(folders, "_warned", set())
    monkeypatch.setenv(folders.SIZE_VARIABLE, "plenty")
    with caplog.at_level(logging.WARNING, "graph_capture"):
        assert size_limit() == size_limit() == folders.DEFAULT_SIZE
    assert [record.message for record in caplog.records if "plenty" in record.message] == [caplog.records[0].message]


def test_the_limit_is_shown(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from graph_capture.cli.main import app

    monkeypatch.setenv(folders.SIZE_VARIABLE, "3M")
    shown = CliRunner().invoke(app, ["cache", "info", "--json", "--folder", str(tmp_path)])
    assert json.loads(shown.stdout)["limit"] == 3 * 2**20
    assert "at most" in CliRunner().invoke(app, ["cache", "info", "--folder", str(tmp_path)]).stdout


def test_keys_know_the_c_library():
    assert environment()["libc"] == c_library()
    assert any(character.isdigit() for character in c_library())


# --- compilers


def compiler(folder, body):
    """A compiler that says what it is, and otherwise does as it likes."""
    path = folder / "cc"
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo odd 1.0; exit 0; fi\n{body}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def ended(process):
    """Whether a process is gone within some seconds, or waits for nothing but to be counted."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def alone(monkeypatch):
    """No toolchain is known, and none is kept."""
    monkeypatch.setattr(host, "_toolchains", {})
    monkeypatch.setattr(host, "_loaded", weakref.WeakValueDictionary())


ODD = {
    "exits 0 with nothing": ("exit 0", "made nothing"),
    "fails with odd bytes": (r"printf '\377\376 no\n' >&2; exit 3", "the C compiler failed: .* no"),
    "fails in silence": ("exit 1", "the C compiler failed"),
    "makes a text": ('for last; do :; done; for word; do [ "$before" = -o ] && echo hi > "$word"; before="$word"; done',
                     "cannot be loaded"),
    "is killed": ("kill -9 $$", "the C compiler failed"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_a_compiler_that_lies_leaves_the_replay_unfused_with_one_message(case, tmp_path, monkeypatch, alone):
    body, message = ODD[case]
    monkeypatch.setenv("CC", str(compiler(tmp_path, body)))
    with pytest.raises(FusionError, match=message):
        host.toolchain()
    fast, x = capture(gated, FusionConfig(profile="static", enable_cache=False)), rand(64)
    with torch.no_grad():
        for _ in range(3):
            same(fast(x), gated(x))


def test_a_compiler_that_hangs_is_ended_with_what_it_started(tmp_path, monkeypatch, alone):
    marker = tmp_path / "child"
    monkeypatch.setenv("CC", str(compiler(tmp_path, f'sleep 600 & echo $! > "{marker}"; wait')))
    monkeypatch.setattr(compiler_process, "SECONDS", 0.5)
    started = time.monotonic()
    with pytest.raises(FusionError, match=r"did not answer within 0\.5 seconds"):
        host.toolchain()
    assert time.monotonic() - started < 20
    assert ended(int(marker.read_text()))


@pytest.mark.parametrize(("variable", "value"), [("CC", "gcc '-O2"), (host.CFLAGS, '-DNAME="x'), ("CC", 'cc "')])
def test_quotes_without_a_partner_are_named(variable, value, monkeypatch, alone):
    monkeypatch.setenv(variable, value)
    with pytest.raises(FusionError, match=rf"{variable}.*cannot be taken apart: No closing quotation"):
        host.toolchain()


def test_an_interrupt_ends_the_compilers(tmp_path, monkeypatch):
    marker = tmp_path / "pid"
    hanging = compiler(tmp_path, f'echo $$ > "{marker}"; sleep 600')

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            compiler_process.run([str(hanging), "-"], "int x;")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert ended(int(marker.read_text()))


# --- temporary folders


def test_a_killed_processs_folder_is_swept_and_a_living_ones_is_not(tmp_path):
    script = textwrap.dedent(
        """
        import sys, time
        from graph_capture.cache import workspace
        print(workspace(), flush=True)
        time.sleep(600)
        """
    )
    surroundings = {**os.environ, "TMPDIR": str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=surroundings)
        for _ in range(2)
    ]
    places = [Path(process.stdout.readline().strip()) for process in processes]
    assert all(place.is_dir() and place.parent == tmp_path for place in places)
    processes[0].kill()
    processes[0].wait()
    try:
        made = subprocess.run(
            [sys.executable, "-c", script.replace("time.sleep(600)", "")],
            env=surroundings, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert not places[0].exists()
        assert places[1].is_dir()
        assert not Path(made.stdout.strip()).exists()  # it ended in order
    finally:
        processes[1].kill()
        processes[1].wait()


def test_a_folder_without_room_is_left_for_another(tmp_path, monkeypatch):
    plain = os.statvfs

    def statvfs(path):
        found = plain(path)
        values = list(found)
        if Path(path) == tmp_path:
            values[4] = 0  # f_bavail
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", statvfs)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    place = workspace()
    assert place.is_dir() and place.parent != tmp_path  # noqa: PT018


# --- interrupts, and what is evicted


def test_arenas_are_free_after_an_interrupt_at_any_line():
    fused, x = fused_of(lambda x: (F.silu(x) * x).sort().values + 1, rand(64)), rand(64)
    want = fused(x)
    assert torch.equal(fused(x), want)
    assert fused.plan is not None
    files = ("runtime/replay/replay.py", "runtime/replay/memory.py", "<plan>")
    lines = [0]

    def interrupted_at(number):
        count = 0

        def trace(frame, event, arg):
            nonlocal count
            if not frame.f_code.co_filename.endswith(files):
                return None
            if event == "line":
                count += 1
                lines[0] = max(lines[0], count)
                if count == number:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            fused(x)
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False

    assert not interrupted_at(-1)
    assert lines[0] > 10
    for number in range(1, lines[0] + 1):
        assert interrupted_at(number)
        assert torch.is_grad_enabled()
        memory = fused._replay._memory
        assert memory.enter(), f"after an interrupt at line {number} nobody gets the arenas"
        memory.leave()
        assert torch.equal(fused(x), want)


def test_arenas_are_one_replays_at_a_time():
    memory = Memory()
    assert memory.enter()
    assert not memory.enter()
    memory.leave()
    assert memory.enter()


def test_evicted_signatures_free_their_kernels():
    fast = capture(gated, always("c", enable_cache=False), max_signatures=1)
    with torch.no_grad():
        fast(rand(4, 8))
        (graph,) = [graph for graphs in fast._graphs.values() for graph in graphs]
        kernel = weakref.ref(graph.regions[0].kernel)
        del graph
        fast(rand(5, 9).double())
    gc.collect()
    assert kernel() is None
