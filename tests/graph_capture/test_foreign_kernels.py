"""Kernels that torch does not know: ninetoothed's handles are recorded as ops, raw Triton launches are found out."""

import pytest
import torch

from graph_capture import FusionConfig, UnrecordedWriteError, capture, fuse, record
from graph_capture.codegen.ninetoothed import host as target
from graph_capture.ir.effects import order_edges
from tests import foreign

DEVICE = "cpu" if target.interpreted() else "cuda"


@pytest.fixture(scope="module")
def handle():
    with target.triton_mode(target.interpreted()):
        ninetoothed = target.import_ninetoothed()
        tensors = tuple(ninetoothed.Tensor(1) for _ in range(3))
        return ninetoothed.make(foreign.arrangement, foreign.application, tensors)


def noise(seed, size=40):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def run(handle, x, y):
    out = torch.empty_like(x)
    handle(x * 2, y, out)
    return out.relu() * 3


def expected(x, y):
    return (x * 2 * y + 1).relu() * 3


def test_a_handle_is_recorded_and_replayed(handle):
    x, y = noise(0), noise(1)
    with record(x, y) as recording:
        recording.output(run(handle, x, y))
    graph = recording.graph
    nodes = graph.subgraph.nodes
    kernel = next(index for index, node in enumerate(nodes) if node.op_type == "external")
    assert nodes[kernel].source.file == __file__
    empty = next(index for index, node in enumerate(nodes) if "empty" in node.op_type)
    assert (empty, kernel) in order_edges(graph.subgraph)
    other = noise(2), noise(3)
    torch.testing.assert_close(graph.run(*other), expected(*other))
    fused = fuse(graph, FusionConfig(profile="always"))
    torch.testing.assert_close(fused(*other), expected(*other))


def test_a_handle_in_a_captured_function(handle):
    fast = capture(lambda x, y: run(handle, x, y))
    for seed in range(3):
        x, y = noise(seed), noise(seed + 1)
        torch.testing.assert_close(fast(x, y), expected(x, y))
    assert len(fast.misses) == 1


def test_the_handles_class_is_left_as_it_was(handle):
    before = type(handle).__call__
    with record(noise(0)) as recording:
        assert type(handle).__call__ is not before
        recording.output(noise(0) + 1)
    assert type(handle).__call__ is before


def test_a_raw_triton_launch_is_found_out():
    import triton
    import triton.language as tl

    with target.triton_mode(target.interpreted()):

        @triton.jit
        def double(source, destination, size: tl.constexpr):
            offsets = tl.arange(0, size)
            tl.store(destination + offsets, tl.load(source + offsets) * 2)

    x = noise(0, 16)
    with pytest.raises(UnrecordedWriteError, match="uninitialised memory made at"), record(x) as recording:
        out = torch.empty_like(x)
        double[(1,)](x, out, 16)
        recording.output(out + 1)
