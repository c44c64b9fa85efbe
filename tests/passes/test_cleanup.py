"""Clean-up: what goes, what must stay, and that nothing changes, bit for bit."""

import pytest
import torch
import torch.nn.functional as F

from graph_capture import FusionConfig, capture, fuse, record
from graph_capture.ir.interpreter import interpret
from graph_capture.passes import clean_up
from graph_capture.passes.cleanup import (
    arguments,
    collapse_views,
    common_subexpressions,
    dead_code,
    no_ops,
    sink_views,
    split_constants,
)
from tests.replaying import printed_by_processes

X = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))


def recorded(function, *args):
    with record(*args) as recording:
        recording.output(function(*args))
    return recording.graph


def cleaned(function, apply, *args):
    """The ops left by `apply`; results and what is written must be the same, bit for bit."""
    args = args or (X,)
    graph = recorded(function, *[arg.clone() for arg in args])
    result = apply(graph.subgraph)
    ours, theirs = [arg.clone() for arg in args], [arg.clone() for arg in args]
    found = interpret(result, [*ours, *graph.captured.values()])
    expected = function(*theirs)
    for got, want in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert torch.equal(got, want)
        assert got.stride() == want.stride()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    return [node.op_type for node in result]


# --- dead code


def test_what_is_not_used_goes():
    def program(x):
        x.sin().cos()
        return x.exp()

    assert cleaned(program, dead_code) == ["exp"]


def test_writes_random_draws_and_guards_stay():
    def program(x):
        x.add_(1)
        torch.rand(2)
        return torch.exp(x * 2)

    torch.manual_seed(0)
    ops = [node.op_type for node in dead_code(recorded(program, X.clone()).subgraph)]
    assert ops == ["aten.add_.Tensor", "aten.rand.default", "mul", "exp"]
    with record(X, data_dependent="guard") as recording:
        recording.output(X * 2 if X.sum() > -1e9 else X)
    kept = [node.op_type for node in dead_code(recording.graph.subgraph)]
    assert any(op.startswith("guard.") for op in kept)


# --- common subexpressions


def test_equal_ops_on_equal_inputs_once():
    def program(x):
        return (x + 1).sin() * (x + 1).cos() + torch.arange(8) + torch.arange(8)

    ops = cleaned(program, common_subexpressions)
    assert ops.count("add") == 3
    assert ops.count("aten.arange.default") == 1


def test_other_arguments_are_other_ops():
    ops = cleaned(lambda x: (x + 1).sin() + (x + 1.5).sin() + (x.long() + 1).sin(), common_subexpressions)
    assert ops.count("sin") == 3


@pytest.mark.parametrize(
    "program",
    [
        lambda x: (x.sin(), x.sin()),  # both are the caller's
        lambda x: (x.sin(), x.sin().view(-1)),
        lambda x: (x.sin().mul_(2), x.sin()),  # one is written
        lambda x: (x.sin() + 0, x.mul_(2), x.sin() + 0),  # the input changes in between
    ],
)
def test_what_must_not_be_shared(program):
    assert cleaned(program, common_subexpressions).count("sin") == 2


def test_random_draws_are_not_shared():
    def program(x):
        return torch.rand_like(x) - torch.rand_like(x)

    graph = recorded(program, X)
    assert len(common_subexpressions(graph.subgraph)) == 3
    torch.manual_seed(3)
    expected = program(X)
    torch.manual_seed(3)
    assert torch.equal(fuse(graph)(X), expected)


# --- no-ops


@pytest.mark.parametrize(
    "nothing",
    [
        lambda x: x * 1.0,
        lambda x: x / 1,
        lambda x: x.clone(),
        lambda x: x.detach(),
        lambda x: x[:],
        lambda x: x.view(3, 4, 8),
        lambda x: x.expand(3, 4, 8),
        lambda x: torch.cat([x, x[..., 8:]], -1),
        lambda x: torch.nn.functional.dropout(x, 0.0),
    ],
)
def test_nothing_happens(nothing):
    assert cleaned(lambda x: nothing(x.sin()).cos(), clean_up) == ["sin", "cos"]


def test_sums_with_zero_are_kept_for_floats():
    assert cleaned(lambda x: (x + 0).sin(), no_ops) == ["add", "sin"]  # -0.0 + 0 is 0.0
    assert cleaned(lambda x: (x + 0) * 2, no_ops, torch.arange(4)) == ["mul"]


@pytest.mark.parametrize(
    "program",
    [
        lambda x: x.clone(),  # the caller's own
        lambda x: x.clone().cumsum_(0),
        lambda x: (x.clone().sin(), x.mul_(2))[0],
        lambda x: x.clone().view(-1),
    ],
)
def test_copies_that_matter(program):
    assert "aten.clone.default" in cleaned(program, clean_up)


def test_a_copy_into_another_layout_is_no_no_op():
    def program(x):
        return x.transpose(0, 1).contiguous().view(-1).sin()

    assert "aten.clone.default" in cleaned(program, clean_up)


# --- views


def test_chains_of_views_become_one():
    assert cleaned(lambda x: x.unsqueeze(0).view(12, 8).unsqueeze(1).sin(), clean_up) == ["aten.view.default", "sin"]
    assert cleaned(lambda x: x.transpose(0, 1).transpose(0, 1).sin(), clean_up) == ["sin"]
    assert cleaned(lambda x: x.view(12, 8).view(3, 4, 8).sin(), clean_up) == ["sin"]
    assert cleaned(lambda x: x.t().t() * 2, clean_up, torch.randn(2, 3)) == ["mul"]


def test_views_of_what_is_written_keep_seeing_it():
    def program(x):
        view = x.view(12, 8).view(-1)
        x.mul_(2)
        return view + 1

    assert "aten.mul_.Tensor" in cleaned(program, collapse_views)


def test_a_norm_of_regrouped_rows_is_the_regrouped_norm():
    norm = torch.nn.LayerNorm(8)
    with torch.no_grad():
        ops = cleaned(lambda x: norm((x + 1).view(-1, 8)) * 2, sink_views)
    assert ops == ["add", "aten.view.default", "layer_norm", "aten.view.default", "mul"]


def test_arguments_have_one_form():
    graph = recorded(lambda x: x.sum(2) + x.sum(-1) + x.softmax(2).sum(-1), X).subgraph
    assert {node.attr("dim") for node in arguments(graph) if node.op_type in ("sum", "softmax")} == {(-1,), -1}
    graph = recorded(lambda x: x.transpose(0, 2) + x.transpose(-1, 0), X).subgraph
    dims = [(n.attr("dim0"), n.attr("dim1")) for n in arguments(graph) if n.op_type.startswith("aten.transpose")]
    assert dims == [(-3, -1), (-3, -1)]


# --- constants


def test_what_depends_on_nothing_is_computed_once():
    def program(x):
        mask = torch.ones(4, 8).tril() * 2
        return x * mask + torch.rand(8) * 0

    fused = fuse(recorded(program, X))
    assert [node.op_type for node in fused.constants] == ["aten.ones.default", "aten.tril.default", "mul"]
    assert fused.constant_bytes == 4 * 8 * 4
    assert "aten.rand.default" in [node.op_type for node in fused.subgraph]
    assert torch.equal(fused(X + 1), program(X + 1))


def test_large_and_returned_constants_are_not_kept():
    def program(x):
        return x.sum() * torch.ones(600, 600).tril(), torch.ones(2)

    fused = fuse(recorded(program, X))
    assert fused.constant_bytes == 0
    first, second = fused(X), fused(X)
    assert first[1].data_ptr() != second[1].data_ptr()


def test_folding_what_depends_on_weights_is_opt_in_and_follows_them():
    weight = torch.nn.Parameter(torch.randn(8))

    def program(x):
        return x * torch.exp(weight * 2)

    with torch.no_grad():
        graph = recorded(program, X)
        assert not fuse(graph).constants.nodes
        fused = fuse(graph, FusionConfig(fold_weights=True))
        assert [node.op_type for node in fused.constants] == ["mul", "exp"]
        assert fused.constant_bytes == 32
        assert torch.equal(fused(X), program(X))
        weight.mul_(0.5)
        assert torch.equal(fused(X), program(X))
        weight.data.mul_(0.5)  # not counted by torch
        fused.refresh()
        assert torch.equal(fused(X), program(X))
        module = torch.nn.Module()
        module.weight, module.forward = weight, program
        fast = capture(module, FusionConfig(fold_weights=True))
        for _ in range(3):
            weight.add_(0.25)
            assert torch.equal(fast(X), program(X))
        assert [node.op_type for node in fast.graphs[0].constants] == ["mul", "exp"]


def test_weights_that_the_graph_writes_are_not_folded():
    counter = torch.zeros(8)

    def program(x):
        counter.add_(1)
        return x * torch.exp(counter)

    constants, rest = split_constants(recorded(program, X).subgraph, ("counter", "const"))
    assert len(constants) == 0
    assert len(rest) == 3


def test_all_of_it_on_a_model():
    from tests.benchmarks.bench_passes import decode_step

    graph = decode_step(2).subgraph
    once = clean_up(graph)
    assert len(once) < 0.9 * len(graph)
    assert clean_up(once) == once


def test_passes_are_the_same_in_every_process():
    program = (
        "import hashlib; from graph_capture import FusionConfig, fuse;"
        "from tests.models import recorded, tiny_llama, token_ids;"
        "fused = fuse(recorded(tiny_llama(), token_ids()), FusionConfig(profile='static'));"
        "text = repr([graph.nodes for _, graph in fused.stages]) + repr(fused.receipts);"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    assert len(printed_by_processes(program)) == 1


def test_a_pass_that_changes_nothing_gives_back_its_graph():
    graph = recorded(lambda x: torch.sin(F.softmax(x, dim=-1)), X).subgraph
    assert arguments(graph) is graph


def test_an_implied_dtype_is_left_out():
    implied = arguments(recorded(lambda x: F.softmax(x, dim=-1, dtype=torch.float32), X).subgraph)
    wider = arguments(recorded(lambda x: F.softmax(x, dim=-1, dtype=torch.float64), X).subgraph)
    assert implied.nodes[0].attr("dtype") is None
    assert wider.nodes[0].attr("dtype") is torch.float64
