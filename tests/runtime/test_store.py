"""What is kept on disk: by many processes at once, through kills, damage, and folders that cannot be used."""

import errno
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from graph_capture import FusionConfig, fuse, record
from graph_capture import cache as cachedir
from graph_capture.cache import DiskCache, cache_folder, environment, environment_key
from graph_capture.cli.main import app
from graph_capture.passes.templates import _OURS, load_templates, store_templates
from graph_capture.runtime.decide import heuristics, whole
from graph_capture.runtime.decide.decision_store import FILE, DecisionStore, Times

KEY, OTHER = "ab" * 32, "cd" * 32


@pytest.fixture(autouse=True)
def warn_again(monkeypatch):
    monkeypatch.setattr(cachedir, "_warned", set())


ROOT = Path(__file__).parent.parent.parent


def child(code, *arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], text=True, env=environment, **options)


# --- the folder


def test_the_folder_is_private_and_chosen_by_argument_then_environment(tmp_path, monkeypatch):
    monkeypatch.setenv(cachedir.VARIABLE, str(tmp_path / "b" / "c"))
    assert cache_folder(tmp_path / "a") == tmp_path / "a"
    assert cache_folder() == tmp_path / "b" / "c"
    assert (tmp_path / "b" / "c").stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv(cachedir.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "graph_capture"


def test_a_folder_that_others_can_write_is_not_used(tmp_path, caplog):
    tmp_path.chmod(0o777)
    found = cache_folder(tmp_path)
    assert found != tmp_path
    assert found.stat().st_mode & 0o777 == 0o700
    assert cache_folder(tmp_path) == found
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "others can write into it" in caplog.text


def test_a_folder_of_somebody_else_is_not_used(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert cache_folder(tmp_path) != tmp_path
    assert "belongs to another user" in caplog.text


def test_a_file_in_the_folders_place_is_not_used(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert cache_folder(tmp_path / "file") != tmp_path / "file"
    assert len(caplog.records) == 1


def test_keys_depend_on_their_parts_and_on_the_environment(monkeypatch):
    assert DiskCache.key("a", "b") == DiskCache.key("a", "b") != DiskCache.key("a", "c")
    before = environment_key()
    monkeypatch.setattr(cachedir, "environment", lambda device: {**environment(device), "torch": "another"})
    assert environment_key() != before
    assert set(environment()) >= {"graph-capture", "torch", "triton", "ninetoothed", "python", "device", "compiler"}


# --- files by key


def test_an_entry_is_what_was_put(tmp_path):
    cache = DiskCache("kernels", tmp_path)
    assert cache.get(KEY, ".so") is None
    assert cache.put(KEY, {".so": b"code", ".c": b"source"})
    assert cache.get(KEY, ".so").read_bytes() == b"code"
    assert cache.read(KEY, ".c") == b"source"
    assert cache.get(KEY, ".json") is None
    assert cache.get(OTHER, ".so") is None
    assert os.access(cache.get(KEY, ".so"), os.X_OK)
    cache.put(KEY, {".so": b"newer"})
    assert cache.read(KEY, ".so") == b"newer"


def test_paths_are_no_keys(tmp_path):
    with pytest.raises(ValueError, match="is not a key"):
        DiskCache("kernels", tmp_path).put("../../evil", {".so": b""})
    assert DiskCache("kernels", tmp_path).get("../evil", ".so") is None


@pytest.mark.parametrize("harm", [b"", b"{", b"[1]", b"null", b'{".so": 3}', b'{".so": "../../x"}', b"\xff\xfe"])
def test_a_damaged_manifest_is_no_entry(tmp_path, harm):
    cache = DiskCache("kernels", tmp_path)
    cache.put(KEY, {".so": b"code"})
    (cache.folder / f"{KEY}.json").write_bytes(harm)
    assert cache.get(KEY, ".so") is None
    assert cache.put(KEY, {".so": b"code"})
    assert cache.read(KEY, ".so") == b"code"


def test_a_damaged_or_foreign_file_is_no_entry(tmp_path, monkeypatch):
    cache = DiskCache("kernels", tmp_path)
    cache.put(KEY, {".so": b"code"})
    path = cache.get(KEY, ".so")
    path.write_bytes(b"cod3")
    assert cache.get(KEY, ".so") is None
    path.unlink()
    (tmp_path / "elsewhere").write_bytes(b"code")
    path.symlink_to(tmp_path / "elsewhere")
    assert cache.get(KEY, ".so") is None
    path.unlink()
    cache.put(KEY, {".so": b"code"})
    assert cache.get(KEY, ".so") is not None
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert cache.get(KEY, ".so") is None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path, caplog, monkeypatch, code):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    cache = DiskCache("kernels", tmp_path)
    cache.put(KEY, {".so": b"code"})
    monkeypatch.setattr(cachedir.os, "replace", fail)
    assert not cache.put(OTHER, {".so": b"code"})
    assert not cache.put(OTHER, {".so": b"code"})
    assert len(caplog.records) == 1
    assert os.strerror(code) in caplog.text
    assert cache.read(KEY, ".so") == b"code"
    assert not [file for file in cache.folder.iterdir() if file.name.startswith(".new_")]


WRITER = """
import sys
from graph_capture.cache import DiskCache
cache = DiskCache("kernels", sys.argv[1])
print("ready", flush=True)
number = 0
while True:
    number += 1
    cache.put("ab" * 32, {".so": bytes([number % 256]) * 400_000, ".c": bytes([number % 256]) * 1000})
"""


def test_killed_writers_leave_whole_entries(tmp_path):
    cache = DiskCache("kernels", tmp_path)
    writers = [child(WRITER, tmp_path, stdout=subprocess.PIPE) for _ in range(2)]
    for writer in writers:
        writer.stdout.readline()
    deadline, seen = time.monotonic() + 1, 0
    while time.monotonic() < deadline:
        data = cache.read(KEY, ".so")
        if data is not None:
            seen += 1
            assert len(data) == 400_000
            assert len(set(data)) == 1
    for writer in writers:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    assert seen
    assert cache.put(KEY, {".so": b"after"})
    assert cache.read(KEY, ".so") == b"after"


# --- decisions


def test_times_are_what_was_put(tmp_path):
    store = DecisionStore(tmp_path)
    assert store.get("a") is None
    assert len(store) == 0
    store.put("a", Times(1e-3, 2e-3, True))
    store.put("a", Times(3e-3, 2e-3))
    assert DecisionStore(tmp_path).get("a") == Times(3e-3, 2e-3, False)
    assert store.get("b") is None
    assert len(store) == 1


@pytest.mark.parametrize("harm", [b"not a database at all" * 100, b"SQLite format 3\0" + b"\xff" * 4000])
def test_a_damaged_database_is_made_anew(tmp_path, caplog, harm):
    store = DecisionStore(tmp_path)
    store.put("a", Times(1.0, 2.0))
    store.path.write_bytes(harm)
    assert store.get("a") is None
    assert len(caplog.records) == 1
    store.put("a", Times(3.0, 4.0))
    assert store.get("a") == Times(3.0, 4.0)
    assert store.path.with_suffix(".damaged").read_bytes() == harm


def test_a_database_damaged_in_its_middle_is_made_anew(tmp_path):
    store = DecisionStore(tmp_path)
    store.put("0", Times(1.0, 2.0))
    with sqlite3.connect(store.path) as connection:
        rows = [(str(number) * 20, 1.0, 2.0, 0, 0, 0.0) for number in range(2000)]
        connection.executemany("INSERT OR REPLACE INTO decisions VALUES (?, ?, ?, ?, ?, ?)", rows)
    connection.close()
    data = bytearray(store.path.read_bytes())
    data[4096:-4096] = b"\xa5" * (len(data) - 8192)
    store.path.write_bytes(data)
    for number in range(0, 2000, 100):
        store.get(str(number) * 20)
    store.put("new", Times(1.0, 2.0))
    assert store.get("new") == Times(1.0, 2.0)


@pytest.mark.parametrize("row", [("a", None, 2.0), ("a", "x", "y"), ("a", 1.0, -2.0), ("a", float("inf"), 1.0)])
def test_rows_that_nobody_measured_do_not_count(tmp_path, row):
    store = DecisionStore(tmp_path)
    store.put("b", Times(1.0, 2.0))
    with sqlite3.connect(store.path) as connection:
        connection.execute("INSERT INTO decisions VALUES (?, ?, ?, 0, 0, 0)", row)
    connection.close()
    assert store.get("a") is None


def test_a_locked_database_costs_one_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("graph_capture.runtime.decide.decision_store._WAIT", 0.01)
    store = DecisionStore(tmp_path)
    store.put("a", Times(1.0, 2.0))
    holder = sqlite3.connect(store.path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    store.put("b", Times(1.0, 2.0))
    store.put("c", Times(1.0, 2.0))
    holder.execute("ROLLBACK")
    holder.close()
    assert len(caplog.records) == 1
    assert "locked" in caplog.text
    assert store.get("b") is None
    store.put("b", Times(1.0, 2.0))
    assert store.get("b") == Times(1.0, 2.0)


def test_a_database_in_a_read_only_folder_is_read(tmp_path, caplog, monkeypatch):
    store = DecisionStore(tmp_path)
    store.put("a", Times(1.0, 2.0))
    monkeypatch.setattr(
        "graph_capture.runtime.decide.decision_store.os.access", lambda *_: False
    )  # root may do everything
    assert store.get("a") == Times(1.0, 2.0)
    store.put("b", Times(1.0, 2.0))
    assert store.get("b") is None
    assert len(caplog.records) == 1


@pytest.mark.parametrize("error", [sqlite3.OperationalError("database or disk is full"), OSError(errno.ENOSPC, "full")])
def test_a_full_disk_costs_one_warning(tmp_path, caplog, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    store = DecisionStore(tmp_path)
    monkeypatch.setattr(DecisionStore, "_open", fail)
    store.put("a", Times(1.0, 2.0))
    store.put("a", Times(1.0, 2.0))
    assert len(caplog.records) == 1
    assert "full" in caplog.text


SHARERS = """
import os, sys
from graph_capture.cache import DiskCache
from graph_capture.runtime.decide.decision_store import DecisionStore, Times
folder, processes, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def work(me):
    store, cache = DecisionStore(folder), DiskCache("kernels", folder)
    for number in range(rounds):
        key = f"{number % 25:064x}"
        cache.put(key, {".so": b"%d" % (number % 25) * 1000})
        assert cache.read(key, ".so") == b"%d" % (number % 25) * 1000
        store.put(f"{me} {number}", Times(1.0 + me, 2.0))
        assert store.get(f"{me} {number}") == Times(1.0 + me, 2.0)
        if number == 0:
            os.write(1, b"ready\\n")  # in one piece: others write as well
children = []
for me in range(processes):
    pid = os.fork()
    if pid == 0:
        work(me)
        os._exit(0)
    children.append(pid)
os.write(1, (" ".join(map(str, children)) + "\\n").encode())
sys.exit(any(os.waitpid(pid, 0)[1] for pid in children))
"""


def test_eight_processes_share_an_empty_folder(tmp_path):
    process = child(SHARERS, tmp_path, 8, 25, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.communicate() == (None, "")
    assert process.returncode == 0
    assert len(DecisionStore(tmp_path)) == 8 * 25
    assert cachedir.contents(tmp_path)["kernels"].entries == 25


def test_killed_processes_leave_a_database_that_opens(tmp_path):
    process = child(SHARERS, tmp_path, 2, 10**9, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    lines = [process.stdout.readline().split() for _ in range(3)]
    time.sleep(0.3)
    for pid in next(line for line in lines if line != ["ready"]):
        os.kill(int(pid), signal.SIGKILL)
    process.communicate()
    store = DecisionStore(tmp_path)
    assert store.get("0 0") == Times(1.0, 2.0)
    store.put("new", Times(1.0, 2.0))
    assert store.get("new") == Times(1.0, 2.0)
    assert not store.path.with_suffix(".damaged").exists()


def test_two_threads_share_a_store(tmp_path):
    errors = []

    def work(me):
        try:
            store = DecisionStore(tmp_path)
            for number in range(50):
                store.put(f"{me} {number}", Times(1.0, 2.0))
                assert store.get(f"{me} {number}") == Times(1.0, 2.0)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(me,)) for me in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(DecisionStore(tmp_path)) == 100


# --- what is measured once


def swiglu(x):
    return F.silu(x) * (x + 1)


def recorded_swiglu():
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    with record(x) as recording:
        recording.output(swiglu(x))
    return x, recording.graph


def test_a_later_scheduler_measures_nothing(monkeypatch, caplog):
    x, graph = recorded_swiglu()
    monkeypatch.setattr(heuristics, "compare", lambda *_: (1.0, 0.5))
    monkeypatch.setattr(whole, "compare", lambda *_: (1.0, 0.5))
    first = fuse(graph)
    assert first.regions[0].decision
    assert not first.regions[0].decision.cached
    assert first.whole
    assert not first.whole.cached

    def fail(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(heuristics, "compare", fail)
    monkeypatch.setattr(whole, "compare", fail)
    second = fuse(graph)
    assert second.regions[0].decision.cached
    assert (second.regions[0].decision.t_fallback, second.regions[0].decision.t_fused) == (1.0, 0.5)
    assert second.whole.cached
    assert "2.00x faster (cached)" in str(second.explain())
    assert json.loads(second.explain().to_json())["whole"]["cached"] is True
    torch.testing.assert_close(second(x), swiglu(x))


def test_what_was_decided_against_is_not_even_compiled(monkeypatch):
    x, graph = recorded_swiglu()
    monkeypatch.setattr(heuristics, "compare", lambda *_: (1.0, 2.0))
    assert not fuse(graph).regions[0].decision
    made = []
    right = heuristics.KernelCompiler.compile
    monkeypatch.setattr(
        heuristics.KernelCompiler, "compile", lambda self, *args: made.append(args) or right(self, *args)
    )
    fused = fuse(graph)
    assert not fused.regions[0].decision
    assert made == []
    assert fused.verify(x).rows
    assert len(made) == 1


def test_the_ratio_is_applied_to_times_from_disk(monkeypatch):
    _, graph = recorded_swiglu()
    monkeypatch.setattr(heuristics, "compare", lambda *_: (1.0, 0.7))
    monkeypatch.setattr(whole, "compare", lambda *_: (1.0, 0.7))
    assert fuse(graph).regions[0].decision
    assert not fuse(graph, FusionConfig(fusion_ratio=0.5)).regions[0].decision


def test_without_a_cache_nothing_is_written(cache_folder):
    _, graph = recorded_swiglu()
    fuse(graph, FusionConfig(enable_cache=False))
    assert list(cache_folder.iterdir()) == []


def test_a_cache_folder_that_fails_changes_no_result(monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    x, graph = recorded_swiglu()
    monkeypatch.setattr(cachedir, "_write", fail)
    monkeypatch.setattr(DecisionStore, "_open", fail)
    torch.testing.assert_close(fuse(graph, FusionConfig())(x), swiglu(x))
    assert all("No space left" in record.message for record in caplog.records)


def test_kernels_that_lose_together_are_left_out(monkeypatch):
    x, graph = recorded_swiglu()
    monkeypatch.setattr(heuristics, "compare", lambda *_: (1.0, 0.5))
    monkeypatch.setattr(whole, "compare", lambda *_: (1.0, 1.1))
    fused = fuse(graph)
    assert not fused.whole
    assert not any(region.decision for region in fused.regions)
    assert "not used: the whole graph is not faster" in str(fused.explain())
    assert torch.equal(fused(x), swiglu(x))


def test_the_whole_is_measured_on_nothing_of_the_users(monkeypatch):
    class Counter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x, cache):
            self.count += 1
            cache.mul_(2)
            return F.silu(x) * (x + self.count)

    monkeypatch.setattr(heuristics, "compare", lambda *_: (1.0, 0.5))
    model, x, cache = Counter(), torch.ones(4, 8), torch.ones(2)
    with record(x, cache) as recording:
        recording.output(model(x, cache))
    fused = fuse(recording.graph)
    assert (model.count.item(), cache.tolist()) == (1, [2, 2])
    assert fused.whole is None
    random = torch.get_rng_state()
    with record(x) as recording:
        recording.output(F.silu(x) * (x + 1) + torch.rand(4, 8))
    drawn = torch.get_rng_state()
    assert not torch.equal(random, drawn)
    assert fuse(recording.graph).whole is not None
    assert torch.equal(torch.get_rng_state(), drawn)


def test_the_whole_is_measured_on_made_up_objects(monkeypatch):
    class Cache:
        def __init__(self):
            self.keys, self.length, self.seen = torch.zeros(8, 4), torch.zeros(1, dtype=torch.int64), [torch.ones(2)]

    def step(x, cache):
        cache.keys.index_copy_(0, cache.length, x)
        cache.length.add_(1)
        cache.seen.append(x)
        return F.silu(cache.keys) * (cache.keys + cache.seen[0][0])

    def often(functions, device):
        for _ in range(20):  # more than the cache has places
            for function in functions:
                function()
        return 1.0, 0.5

    monkeypatch.setattr(heuristics, "compare", lambda *_: (1.0, 0.5))
    monkeypatch.setattr(whole, "compare", often)
    cache, x = Cache(), torch.ones(1, 4)
    with record(x, cache) as recording:
        recording.output(step(x, cache))
    fused = fuse(recording.graph)
    assert fused.whole
    assert cache.length.item() == 1
    assert cache.keys.sum().item() == 4
    assert len(cache.seen) == 2
    fresh = Cache()
    assert torch.allclose(fused(2 * x, fresh), step(2 * x, Cache()))
    assert fresh.length.item() == 1


# --- templates


def test_templates_come_back_as_they_were(tmp_path):
    cache = DiskCache("templates", tmp_path)
    before = {name: item.templates for name, item in _OURS.items()}
    assert load_templates(cache)  # nothing is missing
    store_templates(cache)
    try:
        for item in _OURS.values():
            vars(item).pop("templates")
        assert load_templates(cache)
        assert all("templates" in vars(item) for item in _OURS.values())
        assert {name: item.templates for name, item in _OURS.items()} == before
    finally:
        for name, item in _OURS.items():
            vars(item)["templates"] = before[name]


def test_damaged_templates_are_recorded_again(tmp_path):
    cache = DiskCache("templates", tmp_path)
    name, item = next(iter(_OURS.items()))
    before = item.templates
    for data in (b"", b"{}", b'{"nodes": 3}', b"[" * 100_000, b'{"nodes": [], "patterns": {"%s": 1}}' % name.encode()):
        cache.put(cache.key("templates"), {".templates": data})
        vars(item).pop("templates")
        assert not load_templates(cache)
        assert item.templates == before


def test_templates_do_not_depend_on_the_callers_autocast():
    item = next(item for item in _OURS.values() if item.name == "swiglu")
    before = item.templates
    vars(item).pop("templates")
    with torch.autocast("cpu", torch.bfloat16):
        assert item.templates == before


FRESH = """
import json, sys
import torch
import torch.nn.functional as F
from graph_capture import fuse, record
from graph_capture.passes.pattern import Pattern
from graph_capture.runtime.decide import heuristics
from graph_capture.runtime.decide import whole
counts = {"compare": 0, "patterns": 0}
def counting(name, function):
    def call(*args, **kwargs):
        counts[name] += 1
        return function(*args, **kwargs)
    return call
heuristics.compare = whole.compare = counting("compare", heuristics.compare)
Pattern._record = counting("patterns", Pattern._record)
def run(x, w):
    return F.silu(x) * (F.rms_norm(x + 1, (8,), w) * 2)
x, w = torch.randn(4, 8), torch.randn(8)
with record(x, w) as recording:
    recording.output(run(x, w))
fused = fuse(recording.graph)
print(json.dumps({**counts, "used": [bool(r.decision) for r in fused.regions]}))
torch.testing.assert_close(fused(x, w), run(x, w))
"""


def test_a_second_process_measures_and_records_nothing(cache_folder):
    runs = []
    for _ in range(2):
        process = child(FRESH, stdout=subprocess.PIPE)
        runs.append(json.loads(process.communicate()[0]))
        assert process.returncode == 0
    cold, warm = runs
    assert cold["compare"] > 0
    assert cold["patterns"] > 0
    assert (warm["compare"], warm["patterns"]) == (0, 0)
    assert warm["used"] == cold["used"]


# --- the command line


def test_the_cache_is_shown_and_cleared(tmp_path):
    DiskCache("kernels", tmp_path).put(KEY, {".so": b"code", ".c": b"source"})
    DecisionStore(tmp_path).put("a", Times(1.0, 2.0))
    (tmp_path / "mine.txt").write_text("not the cache's")

    def invoke(*args):
        result = CliRunner().invoke(app, ["cache", *args, "--folder", str(tmp_path)], env={"COLUMNS": "100"})
        assert result.exit_code == 0, result.output
        return result.output

    found = json.loads(invoke("info", "--json"))
    assert found["kernels"]["entries"] == 1
    assert found["kernels"]["files"] == 3
    assert found["decisions"]["entries"] == 1
    text = invoke()
    assert str(tmp_path) in text
    assert "kernels" in text
    assert "removed 4 files" in invoke("clear")
    assert json.loads(invoke("info", "--json"))["kernels"]["files"] == 0
    assert (tmp_path / "mine.txt").exists()
    assert not (tmp_path / FILE).exists()
    assert logging.getLogger("graph_capture").handlers == []
