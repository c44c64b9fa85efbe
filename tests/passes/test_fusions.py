"""Each fusion: numbers, match count, node count, and the twins that must not match."""

import pytest
import torch
import torch.nn.functional as F

from graph_capture import CaptureError, FusionConfig, fuse, record
from graph_capture.codegen import supports
from graph_capture.ir.effects import order_edges
from graph_capture.ir.numerics import distance
from graph_capture.passes import (
    DEFAULT,
    Pattern,
    PatternRegistry,
    canonicalize,
    create_add_rms_norm_pattern,
    create_swiglu_pattern,
    find_regions,
    pattern,
)
from graph_capture.passes.rewrite import Dependencies

ALWAYS = FusionConfig(profile="always")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def rms_norm(x, weight, eps=1e-6):
    hidden = x.to(torch.float32)
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)
    return weight * hidden.to(x.dtype)


def swiglu(gate, up):
    return F.silu(gate) * up


def geglu(gate, up):
    return F.gelu(gate) * up


def geglu_tanh(gate, up):
    return up * F.gelu(gate, approximate="tanh")


def add_rms_norm(x, residual, weight):
    total = x + residual
    return total, rms_norm(total, weight)


def tensors(function, dtype=torch.float32, rows=5, columns=48):
    torch.manual_seed(0)
    full = [torch.randn(rows, columns).to(dtype) for _ in range(2)]
    return [*full, (1 + 0.3 * torch.randn(columns)).to(dtype)] if function is add_rms_norm else full


def recorded(function, args):
    with record(*args) as recording:
        recording.output(function(*args))
    return recording.graph


def kinds(fused):
    return [region.kind for region in fused.regions]


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [swiglu, geglu, geglu_tanh, add_rms_norm], ids=lambda f: f.__name__)
def test_numbers_match_count_and_node_count(function, dtype):
    args = tensors(function, dtype)
    fused = fuse(recorded(function, args), ALWAYS)
    assert kinds(fused) == [function.__name__]
    assert len(fused.subgraph) == 1
    assert fused.regions[0].decision
    fresh = [tensor + 0.5 for tensor in args]
    exact = as_tuple(function(*(tensor.double() for tensor in fresh)))
    for got, eager, want in zip(as_tuple(fused(*fresh)), as_tuple(function(*fresh)), exact, strict=True):
        assert got.dtype is dtype
        # One rounding is free; the interpreter truncates bfloat16, up to one unit in the last place instead of half.
        rounding = torch.finfo(dtype).eps * (1 if dtype is torch.bfloat16 else 0.5)
        assert distance(got, want) <= max(distance(eager, want), rounding)
    assert fused.verify(*fresh).ok


@pytest.mark.parametrize("function", [swiglu, add_rms_norm], ids=lambda f: f.__name__)
def test_layers_are_found_each(function):
    def layers(*args):
        results = [as_tuple(function(*args))[-1]]
        for _ in range(3):
            results.append(as_tuple(function(torch.sin(results[-1] @ torch.eye(48)), *args[1:]))[-1])
        return results[-1]

    fused = fuse(recorded(layers, tensors(function)), ALWAYS)
    assert kinds(fused).count(function.__name__) == 4
    # 4 regions; torch.eye and what it is made of, matmul and sin, three times
    assert all(node.op_type not in ("silu", "rms_norm", "add", "rsqrt") for node in fused.subgraph.nodes)


def test_operands_may_come_in_either_order():
    gate, up = tensors(swiglu)
    fused = fuse(recorded(lambda g, u: u * F.silu(g), (gate, up)), ALWAYS)
    assert kinds(fused) == ["swiglu"]
    torch.testing.assert_close(fused(gate, up), swiglu(gate, up))


def test_an_escaping_intermediate_becomes_an_output():
    gate, up = tensors(swiglu)

    def program(gate, up):
        activated = F.silu(gate)
        return activated * up, activated

    fused = fuse(recorded(program, (gate, up)), ALWAYS)
    assert kinds(fused) == ["swiglu"]
    assert len(fused.regions[0].node.outputs) == 2
    for got, want in zip(fused(gate, up), program(gate, up), strict=True):
        torch.testing.assert_close(got, want)


def test_an_escaping_intermediate_blocks_canonicalisation():
    x, weight = torch.randn(3, 16), torch.randn(16)

    def program(x, weight):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return weight * (x * scale), scale

    graph = recorded(program, (x, weight))
    assert "rms_norm" not in [node.op_type for node in canonicalize(graph.subgraph)]
    for got, want in zip(fuse(graph, ALWAYS)(x, weight), program(x, weight), strict=True):
        torch.testing.assert_close(got, want)


def test_a_write_between_the_ops_blocks_the_region():
    def program(gate):
        up = gate.view(-1)  # the same memory
        activated = F.silu(gate.view(-1))
        up.mul_(2)
        return activated * up

    graph = recorded(program, (torch.randn(8),))
    fused = fuse(graph, ALWAYS)
    assert kinds(fused) == []
    receipt = next(rule for rule in fused.explain().rules if rule["rule"] == "swiglu")
    assert (receipt["candidates"], receipt["matches"]) == (1, 0)
    assert "cycle through aten.mul_.Tensor" in next(iter(receipt["refusals"]))
    x = torch.randn(8)
    assert torch.equal(fused(x.clone()), program(x.clone()))


def test_a_write_after_the_reads_does_not_block():
    def program(gate, up):
        activated = F.silu(gate)
        gate.mul_(2)
        return activated * up, gate + 1

    graph = recorded(program, tensors(swiglu))
    fused = fuse(graph, ALWAYS)
    assert kinds(fused) == ["swiglu"]
    first, second = tensors(swiglu)
    for got, want in zip(fused(first.clone(), second), program(first.clone(), second), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shape", [(48,), (5, 1), (1, 1), ()], ids=str)
def test_rows_columns_and_scalars_broadcast(shape):
    gate, up = torch.randn(5, 48), torch.randn(shape)
    fused = fuse(recorded(swiglu, (gate, up)), ALWAYS)
    assert kinds(fused) == ["swiglu"]
    torch.testing.assert_close(fused(gate, up), swiglu(gate, up))


def test_a_dtype_that_no_kernel_takes_is_refused_with_the_reason():
    gate, up = torch.randn(2, 3, 4, 8), torch.randn(2, 1, 4, 8)
    assert kinds(fuse(recorded(swiglu, (gate, up)), ALWAYS)) == ["swiglu"]  # broadcasts in the middle
    gate, up = gate.to(torch.complex64), up.to(torch.complex64)
    fused = fuse(recorded(swiglu, (gate, up)), ALWAYS)
    assert kinds(fused) == []
    receipt = next(rule for rule in fused.explain().rules if rule["rule"] == "swiglu")
    assert "complex64 is not supported" in next(iter(receipt["refusals"]))
    assert torch.equal(fused(gate, up), swiglu(gate, up))


def test_attributes_must_fit():
    x, residual, weight = tensors(add_rms_norm)
    fused = fuse(recorded(lambda x, r, w: rms_norm(torch.add(x, r, alpha=2), w), (x, residual, weight)), ALWAYS)
    assert kinds(fused) == ["rms_norm"]
    over_rows = recorded(lambda x: x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6) * x, (x,))
    assert "rms_norm" not in [node.op_type for node in canonicalize(over_rows.subgraph)]


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.1])
def test_epsilon_is_captured(eps):
    x, weight = torch.randn(3, 16) * 0.1, torch.ones(16)
    graph = canonicalize(recorded(lambda x, w: rms_norm(x, w, eps), (x, weight)).subgraph)
    assert [(node.op_type, node.attr("eps")) for node in graph] == [("rms_norm", eps)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_spellings_become_one_op(dtype):
    x, weight = torch.randn(3, 16).to(dtype), torch.randn(16).to(dtype)

    def weight_first(x, weight):
        hidden = x.float()
        return (weight * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6))).to(x.dtype)

    for spelling in (rms_norm, weight_first, lambda x, w: F.rms_norm(x, (16,), w, 1e-6)):
        graph = recorded(spelling, (x, weight))
        assert [node.op_type for node in canonicalize(graph.subgraph)] == ["rms_norm"]


def test_the_weight_must_span_the_row():
    x = torch.randn(3, 16)
    for weight in (torch.randn(3, 16), torch.randn(1), torch.randn(3, 1)):
        graph = canonicalize(recorded(rms_norm, (x, weight)).subgraph)
        assert [node.op_type for node in graph] == ["rms_norm", "mul"]
        assert len(graph.nodes[0].inputs) == 1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 8), (2, 3, 8)], ids=str)
def test_linear_is_found_where_only_its_parts_were_recorded(shape, bias):
    from graph_capture.record.recorder import Recording

    layer, x = torch.nn.Linear(8, 5, bias=bias), torch.randn(shape)
    with Recording((x,), {}, keep_whole=False) as recording:
        recording.output(layer(x))
    graph = canonicalize(recording.graph.subgraph)
    assert [node.op_type for node in graph] == ["linear"]
    assert [node.op_type for node in graph.nodes[0].recorded] == [n.op_type for n in recording.graph.subgraph]
    torch.testing.assert_close(fuse(recording.graph, ALWAYS)(x), layer(x))


def test_a_view_that_is_not_a_linear():
    from graph_capture.record.recorder import Recording

    x, weight = torch.randn(2, 3, 8), torch.randn(5, 8)
    with Recording((x, weight), {}, keep_whole=False) as recording:
        recording.output((x.view(6, 8) @ weight.t()).view(3, 2, 5))
    graph = canonicalize(recording.graph.subgraph)
    assert [node.op_type for node in graph] == ["aten.view.default", "linear", "aten.view.default"]  # of the 2-D view


def test_pointwise_chains_grow():
    def program(x, y):
        return (torch.exp(x) + y).tanh() * 2 - x

    x, y = tensors(swiglu)
    fused = fuse(recorded(program, (x, y)), ALWAYS)
    assert kinds(fused) == ["pointwise"]
    assert len(fused.subgraph) == 1
    torch.testing.assert_close(fused(x, y), program(x, y))


def test_chains_stop_at_the_size_limit_and_at_other_shapes():
    def chain(x):
        for _ in range(10):
            x = torch.sin(x)
        return x

    x = torch.randn(4, 8)
    fused = fuse(recorded(chain, (x,)), FusionConfig(profile="always", max_graph_size=4))
    assert [len(region.nodes) for region in fused.regions] == [4, 4, 2]
    torch.testing.assert_close(fused(x), chain(x))
    two = fuse(recorded(lambda x, y: torch.sin(torch.cos(x)) + torch.exp(torch.cos(y)), (x, torch.randn(8))), ALWAYS)
    assert sorted(len(region.nodes) for region in two.regions) == [2, 3]


def test_regions_are_deterministic():
    graph = recorded(lambda x, y: swiglu(torch.sin(x), y) + torch.cos(x) * y, tensors(swiglu)).subgraph
    plans = [find_regions(canonicalize(graph), supports=supports).graph for _ in range(3)]
    assert plans[0] == plans[1] == plans[2]


def test_two_regions_that_are_cyclic_together():
    # a -> b and c -> d are each convex; with a -> d and c -> b, contracting both would make a cycle.
    registry = PatternRegistry([Pattern("exp_add", lambda x, y: torch.exp(x) + y)])

    def program(x, y):
        a, c = torch.exp(x), torch.exp(y)
        return a + c.sum(0), c + a.sum(0)

    args = (torch.randn(4, 4), torch.randn(4, 4))
    plan = find_regions(recorded(program, args).subgraph, supports=supports, patterns=registry, off={"pointwise"})
    receipt = plan.receipts[0]
    assert (receipt.candidates, receipt.matches) == (2, 1)
    assert receipt.refusals == (("would have created a cycle with other regions", 1),)
    for got, want in zip(fuse(recorded(program, args), ALWAYS)(*args), program(*args), strict=True):
        torch.testing.assert_close(got, want)


# --- registering


def test_a_pattern_is_one_function():
    registry = PatternRegistry()

    @pattern("squared_relu_glu", registry=registry)
    def squared_relu_glu(gate, up):
        return torch.relu(gate).pow(2) * up

    args = tensors(swiglu)
    plan = find_regions(canonicalize(recorded(squared_relu_glu, args).subgraph), supports=supports, patterns=registry)
    assert [node.op_type for node in plan.graph] == ["fused.squared_relu_glu"]
    assert "squared_relu_glu" not in [item.name for item in DEFAULT]


def test_a_name_is_registered_once():
    registry = PatternRegistry()
    function = lambda x: torch.exp(x) + 1  # noqa: E731
    pattern("mine", registry=registry)(function)
    pattern("mine", registry=registry)(function)  # the same one again is nothing new
    with pytest.raises(CaptureError, match="'mine' is registered already"):
        pattern("mine", registry=registry)(lambda x: torch.exp(x) + 2)
    with pytest.raises(CaptureError, match="'swiglu' is registered already"):
        pattern("swiglu")(lambda x: x + 1)


def test_patterns_must_be_recordable():
    constant = torch.ones(8)
    for function, match in (
        (lambda x: x + constant, "not its parameters"),
        (lambda x: (x + 1, x * 2), "returns 2 tensors and names 1"),
        (lambda x, y: (x + 1, y * 2)[1] + 0 * x.sin().cos().exp()[:1], None),
    ):
        if match:
            with pytest.raises(CaptureError, match=match):
                _ = Pattern("bad", function).templates
    with pytest.raises(CaptureError, match="connected by the values they share"):
        _ = Pattern("bad", lambda x, y: (x + 1, y * 2), outputs=("a", "b")).templates


# --- cost


def test_matching_is_local(monkeypatch):
    """Work per layer is constant: the values that the matcher looks at grow with the graph's length, not faster."""
    from graph_capture.passes import match

    looked = []
    original = match._Search._value
    monkeypatch.setattr(match._Search, "_value", lambda *args: looked.append(1) or original(*args))

    def layers(count):
        def program(x, up, weight):
            for _ in range(count):
                x = rms_norm(swiglu(x, up) + x, weight)
            return x

        looked.clear()
        args = tensors(add_rms_norm)
        find_regions(canonicalize(recorded(program, args).subgraph), supports=supports)
        return sum(looked)

    small, large = layers(4), layers(16)
    assert large <= 4.5 * small


def test_regions_are_convex_over_order_edges():
    def program(x, y):
        a = torch.exp(x)
        y.add_(a)
        b = torch.sigmoid(a) * 2
        y.mul_(b)
        return b + torch.tanh(a), y + 0

    args = (torch.randn(4, 8), torch.randn(4, 8))
    graph = recorded(program, args).subgraph
    plan = find_regions(graph, supports=supports)
    assert order_edges(graph)
    dependencies = Dependencies(graph)
    index_of = {name: i for i, node in enumerate(graph.nodes) for name in node.outputs}
    for node in plan.graph.nodes:
        members = [index_of[recorded_node.outputs[0]] for recorded_node in node.recorded]
        assert dependencies.detour(members) is None
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    fused = fuse(recorded(program, args), ALWAYS)
    for got, want in zip(fused(x, y.clone()), program(x, y.clone()), strict=True):
        torch.testing.assert_close(got, want)


def test_patterns_take_their_inputs_in_the_order_of_the_function():
    assert create_swiglu_pattern().input_names == ("gate", "up")
    assert create_add_rms_norm_pattern().input_names == ("x", "residual", "weight")
