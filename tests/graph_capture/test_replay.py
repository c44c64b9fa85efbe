"""Static plans: what a replay may and may not share, and what happens when it is disturbed."""

import gc
import os
import signal
import threading
import tracemalloc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graph_capture import FusionConfig, SignatureMismatchError, fuse
from tests.replaying import UNFUSED, Gated, graph_of, noise

LENT = FusionConfig(enable_fusion=False, clone_outputs=False)
interrupts = {"left": 0, "calls": []}


@torch.library.custom_op("graph_capture_tests::interrupted", mutates_args=())
def interrupted(x: torch.Tensor) -> torch.Tensor:
    """Doubles; or is interrupted, or calls back."""
    if interrupts["calls"]:
        interrupts["calls"].pop()()
    if interrupts["left"]:
        interrupts["left"] -= 1
        raise KeyboardInterrupt
    return x * 2


@interrupted.register_fake
def _(x):
    return torch.empty_like(x)


def chain(x, weight):
    y = torch.tanh(x * 3 + 1)
    z = F.linear(y.view(-1, 8), weight).view(2, 2, 8).transpose(0, 1)
    w = z.softmax(-1)
    w.mul_(2)
    return (w + z).sum(-1), z


def replayed(function, *args, config=UNFUSED):
    """The fused graph of a function, twice: as what has a plan, and as what is called."""
    fused = fuse(graph_of(function, *args), config)
    fused(*args)
    assert fused.plan is not None
    return fused, fused


def test_every_op_of_a_chain_writes_into_the_arena():
    x, weight = noise(4, 8), noise(8, 8, seed=1)
    graph, run = replayed(chain, x, weight)
    for seed in range(3):
        x = noise(4, 8, seed=seed)
        for got, want in zip(run(x, weight), chain(x, weight), strict=True):
            assert torch.equal(got, want)
            assert got.stride() == want.stride()
    plan = graph.plan
    assert plan.counts["into the arena"] >= 4
    (device,) = plan.peak_bytes
    assert plan.peak_bytes[device] <= 2 * plan.eager_bytes[device]
    assert "arena: cpu" in str(plan)


def test_values_that_do_not_meet_share_memory():
    def deep(x):
        for _ in range(20):
            x = x * 1.5
        return x + 1

    graph, run = replayed(deep, noise(1000))
    assert torch.equal(run(noise(1000, seed=1)), deep(noise(1000, seed=1)))
    assert sum(graph.plan.peak_bytes.values()) <= 2 * 4096


def test_results_are_the_callers_to_keep():
    x, weight = noise(4, 8), noise(8, 8, seed=1)
    _, run = replayed(chain, x, weight)
    first = run(x, weight)
    kept = [tensor.clone() for tensor in first]
    first[1].add_(1)
    second = run(noise(4, 8, seed=5), weight)
    assert torch.equal(first[0], kept[0])
    assert torch.equal(first[1], kept[1] + 1)
    assert not {t.untyped_storage().data_ptr() for t in first} & {t.untyped_storage().data_ptr() for t in second}
    assert all(torch.equal(a, b) for a, b in zip(run(x, weight), kept, strict=True))


def test_a_plan_keeps_nothing_of_a_call():
    weight = noise(8, 8, seed=1)
    _, run = replayed(chain, noise(4, 8), weight)
    x = noise(4, 8, seed=3)
    results = run(x, weight)
    watched = [weakref.ref(x), *map(weakref.ref, results)]
    del x, results
    gc.collect()
    assert [ref() for ref in watched] == [None] * 3


def test_weights_are_read_in_place_and_followed_when_they_move():
    model = Gated().eval()
    fused = fuse(graph_of(model, noise(2, 4)), UNFUSED)
    for _ in range(3):
        with torch.no_grad():
            model.up.weight.mul_(1.5)
            assert torch.equal(fused(noise(2, 4)), model(noise(2, 4)))
    model.up.weight.data = model.up.weight.data.clone()
    with pytest.raises(SignatureMismatchError, match="memory"):
        fused(noise(2, 4))


def test_merged_weights_move_under_a_plan():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

        def forward(self, x):
            return F.relu(self.a(x)) * self.b(x)

    model = Two()
    graph = graph_of(model, noise(2, 8))
    unfused = fuse(graph, UNFUSED)
    for _ in range(2):
        unfused(noise(2, 8))
    assert unfused.plan is not None
    fuse(graph, FusionConfig(profile="always"))  # the weights become views of one buffer
    for seed in range(4):
        with torch.no_grad():
            model.a.weight.mul_(2)
            assert torch.equal(unfused(noise(2, 8, seed=seed)), model(noise(2, 8, seed=seed)))


def test_modes_of_the_caller_come_and_go():
    x, weight = noise(4, 8), noise(8, 8, seed=1)
    _, run = replayed(chain, x, weight)
    want = chain(x, weight)
    with torch.inference_mode():
        assert torch.equal(run(x, weight)[0], want[0])
    assert torch.equal(run(x, weight.requires_grad_())[0], want[0])
    assert torch.is_grad_enabled()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(SignatureMismatchError, match="autocast: recorded under"):
        run(x, weight.detach())
    assert not run(x, weight.detach())[0].is_inference()


def test_a_plan_made_in_inference_mode_serves_outside():
    x, weight = noise(4, 8), noise(8, 8, seed=1)
    fused = fuse(graph_of(chain, x, weight), UNFUSED)
    with torch.inference_mode():
        fused(x, weight), fused(x, weight)
    assert torch.equal(fused(x, weight)[0], chain(x, weight)[0])


# --- disturbances


def around(x):
    return interrupted(torch.tanh(x) * 3) + 1


def test_an_interrupt_leaves_a_plan_that_works():
    _, run = replayed(around, noise(8))
    interrupts["left"] = 1
    with pytest.raises(KeyboardInterrupt):
        run(noise(8, seed=1))
    for seed in (2, 3):
        assert torch.equal(run(noise(8, seed=seed)), around(noise(8, seed=seed)))
    assert torch.is_grad_enabled()


def test_a_replay_inside_a_replay_has_memory_of_its_own():
    _, run = replayed(around, noise(8))
    inner = []
    interrupts["calls"] = [lambda: inner.append(run(noise(8, seed=1)))]
    assert torch.equal(run(noise(8, seed=2)), around(noise(8, seed=2)))
    assert torch.equal(inner[0], around(noise(8, seed=1)))


def test_replays_at_once_do_not_share():
    x, weight = noise(4, 8), noise(8, 8, seed=1)
    _, run = replayed(chain, x, weight)
    wrong, barrier = [], threading.Barrier(4)

    def work(seed):
        x = noise(4, 8, seed=seed)
        want = chain(x, weight)
        barrier.wait()
        for _ in range(100):
            if not all(torch.equal(a, b) for a, b in zip(run(x, weight), want, strict=True)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_fork_in_the_middle_of_a_replay():
    graph, run = replayed(around, noise(8))
    started, finish = threading.Event(), threading.Event()
    interrupts["calls"] = [lambda: (started.set(), finish.wait())]
    thread = threading.Thread(target=run, args=(noise(8),))
    thread.start()
    started.wait()
    child = os.fork()
    if not child:
        try:
            signal.alarm(30)
            assert graph._replay._memory.enter()  # the parent's thread does not hold it here
            graph._replay._memory.leave()
            right = torch.equal(run(noise(8, seed=4)), around(noise(8, seed=4)))
            os._exit(0 if right else 1)
        except BaseException:
            os._exit(2)
    finish.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(run(noise(8, seed=5)), around(noise(8, seed=5)))


def test_ten_thousand_replays_leak_nothing():
    _, run = replayed(lambda x: torch.tanh(x * 2).view(2, 4) + 1, noise(8))
    x = noise(8)

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for _ in range(500):
        run(x)
    gc.collect()
    objects, before = len(gc.get_objects()), resident()
    tracemalloc.start()
    try:
        for _ in range(9_500):
            run(x)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 64 * 1024
    finally:
        tracemalloc.stop()
    assert len(gc.get_objects()) - objects < 100
    assert resident() - before < 4 * 2**20


# --- results that are lent


def state(x, hidden):
    hidden = torch.tanh(hidden + x)
    return hidden * 2, hidden


def test_lent_results_are_overwritten_by_the_next_replay():
    x = noise(8)
    fused, run = replayed(lambda x: torch.tanh(x) * 2, x, config=LENT)
    first = run(x)
    want = first.clone()
    second = run(noise(8, seed=1))
    assert second.data_ptr() == first.data_ptr()
    assert not torch.equal(first, want)
    assert len(fused.plan.lent) == 1


def test_the_latest_results_may_be_fed_back():
    want = got = noise(8)
    _, run = replayed(state, noise(8), got, config=LENT)
    for seed in range(6):
        _, want = state(noise(8, seed=seed), want)
        _, got = run(noise(8, seed=seed), got)
    assert torch.equal(got, want)


def test_a_stale_result_is_refused():
    _, run = replayed(state, noise(8), noise(8), config=LENT)
    _, stale = run(noise(8), noise(8))
    run(noise(8), noise(8))
    with pytest.raises(SignatureMismatchError, match="arg1"):
        run(noise(8), stale)
    with pytest.raises(SignatureMismatchError, match="clone it"):
        run(noise(8), stale.view(8))
    kept = stale.clone()
    assert torch.equal(run(noise(8), kept)[1], torch.tanh(kept + noise(8)))


def test_a_lent_result_is_not_written_as_an_argument():
    def count(x, total):
        total.add_(x)
        return total * 2

    _, run = replayed(count, noise(8), noise(8, seed=1), config=LENT)
    result = run(noise(8), noise(8))
    with pytest.raises(SignatureMismatchError, match="is to be written"):
        run(noise(8), result)


def test_without_lending_results_are_ordinary_arguments():
    _, run = replayed(state, noise(8), noise(8), config=UNFUSED)
    old = run(noise(8), noise(8))[1]
    run(noise(8), old)
    assert torch.equal(run(noise(8), old)[1], torch.tanh(old + noise(8)))
