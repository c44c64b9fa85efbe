"""`doctor` on models with a fault planted in a compiler: it names the op."""

import json

import pytest
import torch
from torch import nn

from graph_capture import FusionConfig, doctor


class Model(nn.Module):
    """One layer of a transformer, written out: each fault has its op in here."""

    def __init__(self):
        super().__init__()
        self.embed, self.q, self.head = nn.Embedding(32, 16), nn.Linear(16, 16), nn.Linear(16, 32)
        self.register_buffer("cache", torch.zeros(1, 8, 16))

    def forward(self, tokens):
        x = self.embed(tokens)
        variance = x.double().pow(2).mean(-1, keepdim=True)
        x = (x * torch.rsqrt(variance + 1e-6)).float()
        positions = torch.arange(0, 8, dtype=torch.float32)
        angle = positions[:, None] * torch.logspace(0, -2, 8)
        angle = torch.cat([angle, angle], -1)
        q = self.q(x)
        self.cache.copy_(q)
        left, right = q.chunk(2, -1)
        turned = torch.cat([-right, left], -1)
        q = q * angle.cos() + turned * angle.sin()
        scores = torch.matmul(q, self.cache.transpose(-1, -2)) / 4.0
        mask = torch.triu(torch.ones(8, 8), diagonal=1).bool()
        scores = scores.masked_fill(mask, -1e4)
        y = torch.softmax(scores, -1) @ x
        y = torch.tanh(y) + x * y
        return self.head(torch.relu(y)) + y.sum(-1, keepdim=True)


def target(node):
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def first(graph, name, index=0):
    found = [node for node in graph.nodes if node.op.startswith("call") and target(node) == name]
    return found[index] if len(found) > index else None


def _replaced(graph, node, function, *args):
    node.op, node.target, node.args, node.kwargs = "call_function", function, args, {}


def wrong_epsilon(graph):
    node = first(graph, "add")
    if node is not None:
        node.args = (node.args[0], 1e-2)
    return "add"


def dropped_cast(graph):
    node = first(graph, "double")
    if node is not None:
        node.target = "half"
    return "double"


def swapped_halves(graph):
    node = first(graph, "cat", 1)
    if node is not None:
        node.args = ([*reversed(node.args[0])], *node.args[1:])
    return "cat"


def stale_cache(graph):
    node, kept = first(graph, "matmul"), []

    def stale(left, right):
        kept.append(torch.matmul(left, right)) if not kept else None
        return kept[0]

    if node is not None:
        _replaced(graph, node, stale, *node.args)
    return "matmul"


def race(graph):
    node = first(graph, "softmax")
    if node is not None:
        _replaced(graph, node, lambda x: torch.softmax(x + torch.rand_like(x), -1), node.args[0])
    return "softmax"


def wrong_mask(graph):
    node = first(graph, "triu")
    if node is not None:
        node.kwargs = {"diagonal": 2}
    return "triu"


def off_by_one(graph):
    node = first(graph, "arange")
    if node is not None:
        node.args = (1, 9)
    return "arange"


def missing_scale(graph):
    node = first(graph, "truediv")
    if node is not None:
        node.args = (node.args[0], 1.0)
    return "truediv"


def wrong_broadcast(graph):
    node = first(graph, "sum")
    if node is not None:
        _replaced(graph, node, lambda y: y.sum(-2, keepdim=True).mean(-1, keepdim=True).expand(1, 8, 1), node.args[0])
    return "sum"


def alias(graph):
    node = first(graph, "tanh")
    if node is not None:
        node.target = torch.tanh_
    return "tanh"


FAULTS = [wrong_epsilon, dropped_cast, swapped_halves, stale_cache, race]
FAULTS += [wrong_mask, off_by_one, missing_scale, wrong_broadcast, alias]


def with_fault(plant):
    def backend(module, inputs):
        plant(module.graph)
        module.recompile()
        return module.forward

    return backend


@pytest.fixture
def model():
    torch.manual_seed(0)
    yield Model().eval()
    torch._dynamo.reset()


TOKENS = torch.arange(8).flip(0)[None]


def test_nine_of_ten_planted_faults_are_named(model):
    named = {}
    for plant in FAULTS:
        found = doctor(model, TOKENS, backends={"planted": with_fault(plant)}, config=FusionConfig(profile="static"))
        planted = next(f for f in found.findings if f.way == "planted")
        assert all(f.ok for f in found.findings if f.way != "planted"), str(found)
        name = plant(torch.fx.Graph())
        named[plant.__name__] = (
            not planted.ok and f"= {name} (" in planted.first and __file__ in planted.first,
            planted,
        )
    wrong = {name: finding for name, (right, finding) in named.items() if not right}
    assert len(FAULTS) == 10
    assert len(wrong) <= 1, wrong


def test_a_model_without_a_fault_is_well_in_every_way(model):
    found = doctor(model, (TOKENS,), config=FusionConfig(profile="always"))
    assert [f.way for f in found.findings] == ["eager", "torch.compile", "ours, unfused", "ours, fused"]
    assert found.ok, str(found)
    assert found.in_float64
    assert 0 < found.findings[0].error < 1e-5
    assert json.loads(found.to_json())["ways"][1] == vars(found.findings[1])
    assert not model.cache.any()  # as it was


class Choice(nn.Module):
    """Two candidates that lie one rounding apart, or far."""

    def __init__(self, gap):
        super().__init__()
        self.gap = gap

    def forward(self, x):
        return torch.stack([x, x - self.gap], -1)


def _turns(module, inputs):
    return lambda *args: tuple(y.flip(-1) for y in module(*args))


@pytest.mark.parametrize(("gap", "near"), [(1e-7, True), (0.5, False)])
def test_near_ties_are_told_from_faults(gap, near):
    found = doctor(Choice(gap), torch.ones(1, 3), backends={"turned": _turns}).findings[1]
    assert (found.ties, found.choices) == ((3, 0) if near else (0, 3))
    assert found.ok is near


def test_what_a_way_raises_is_its_verdict(model):
    def raises(module, inputs):
        raise RuntimeError("no such compiler")

    found = doctor(model, TOKENS, backends={"broken": raises})
    assert not found.ok
    assert "no such compiler" in found.findings[1].failed
    assert "no such compiler" in str(found)


def test_the_command_ends_with_its_verdict():
    from typer.testing import CliRunner

    from graph_capture.cli.main import app

    result = CliRunner().invoke(
        app, ["doctor", "llama-tiny", "--layers", "1", "--prompt", "4", "--no-compare", "--json"]
    )
    assert result.exit_code == 0, result.output
    assert [way["way"] for way in json.loads(result.stdout)["ways"]] == ["eager", "ours, unfused", "ours, fused"]
