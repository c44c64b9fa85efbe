"""Random programs: regions are convex, and rewriting keeps the numbers."""

import torch
from graph_capture.passes.rewrite import Dependencies
from hypothesis import given, settings
from hypothesis import strategies as st

from graph_capture import FusionConfig, fuse, record

UNARY = [torch.sin, torch.exp, torch.tanh, torch.sigmoid, torch.relu, torch.neg]
BINARY = [torch.add, torch.sub, torch.mul, torch.maximum]

step = st.tuples(
    st.sampled_from(["unary", "binary", "write", "view", "sum"]),
    st.integers(0, 99),
    st.integers(0, 99),
    st.integers(0, 99),
)


def run(program, x, y):
    """Interpret `program` on two [4, 8] tensors; values stay bounded."""
    values = [x, y]
    for kind, which, first, second in program:
        a, b = values[first % len(values)], values[second % len(values)]
        if kind == "unary":
            values.append(UNARY[which % len(UNARY)](a.clamp(-2, 2)))
        elif kind == "binary":
            values.append(BINARY[which % len(BINARY)](a, b).clamp(-2, 2))
        elif kind == "write":
            a.mul_(0.5).add_(0.25)
        elif kind == "view":
            values.append((a[:, :], a.t().t(), a.view_as(a) if a.is_contiguous() else a)[which % 3])
        else:
            values.append((a - a.mean(-1, keepdim=True)).clamp(-2, 2))
    return tuple(values[2:]) or (x + y,)


@settings(max_examples=25, deadline=None)
@given(st.lists(step, min_size=3, max_size=20), st.integers(0, 2**16))
def test_rewriting_keeps_numbers_and_order(program, seed):
    torch.manual_seed(seed)
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    with record(x, y) as recording:
        recording.output(run(program, x, y))
    graph = recording.graph
    fused = fuse(graph, FusionConfig(profile="always"))
    dependencies = Dependencies(graph.subgraph)
    index_of = {name: i for i, node in enumerate(graph.subgraph.nodes) for name in node.outputs}
    for region in fused.regions:
        assert dependencies.detour([index_of[node.outputs[0]] for node in region.nodes]) is None
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    want = run(program, x.clone(), y.clone())
    unfused_x, unfused_y = x.clone(), y.clone()
    unfused = graph.run(unfused_x, unfused_y)
    fused_x, fused_y = x.clone(), y.clone()
    for got, plain, eager in zip(fused(fused_x, fused_y), unfused, want, strict=True):
        assert torch.equal(plain, eager)
        torch.testing.assert_close(got, eager, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused_x, unfused_x, rtol=1e-4, atol=1e-5)
