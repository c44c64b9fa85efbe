"""One of each thing that can be added from outside the package, as a user would add it."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from graph_capture import (
    CaptureError,
    FusionConfig,
    FusionError,
    InferEngine,
    SubGraph,
    Target,
    TensorMeta,
    fuse,
    pattern,
    register_architecture,
    register_op,
    register_target,
    spelling,
    unregister_architecture,
    unregister_op,
    unregister_spelling,
    unregister_target,
)
from graph_capture.codegen.spec.kernel import Operand
from graph_capture.ir.interpreter import interpret
from graph_capture.passes import DEFAULT, PatternRegistry
from tests.replaying import graph_of, noise

ALWAYS = FusionConfig(profile="always", enable_cache=False)


def swiglu(gate, up):
    return F.silu(gate) * up


def two():
    return noise(8, 4), noise(8, 4, seed=1)


# --- an op


@torch.library.custom_op("graph_capture_tests::bump", mutates_args=())
def bump(x: torch.Tensor, slope: float = 2.0) -> torch.Tensor:
    """A bump around 0, of this slope."""
    return slope / (1 + x * x)


@bump.register_fake
def _(x, slope=2.0):
    return torch.empty_like(x)


BUMP = torch.ops.graph_capture_tests.bump.default


@pytest.fixture
def bump_op():
    yield register_op("bump", BUMP, "slope / (1 + x * x)")
    unregister_op("bump")


def test_an_op_is_named_and_fused(bump_op):
    graph = graph_of(lambda x: torch.tanh(bump(x * 2, 3.0) + 1), noise(64, 8))
    assert [node.op_type for node in graph.subgraph] == ["mul", "bump", "add", "tanh"]
    fused = fuse(graph, ALWAYS)
    assert [node.op_type for node in fused.subgraph] == ["fused.pointwise"]
    x = noise(64, 8, seed=1)
    torch.testing.assert_close(fused(x), torch.tanh(bump(x * 2, 3.0) + 1))
    assert fused.verify(x).ok


def test_without_its_row_the_op_is_opaque():
    graph = graph_of(lambda x: bump(x * 2) + 1, noise(8))
    assert [node.op_type for node in graph.subgraph] == ["mul", "graph_capture_tests.bump.default", "add"]


def test_a_row_op():
    def centred(x):
        return x - x.mean(-1, keepdim=True)

    row = register_op("centred", centred, "x - mean(x)", kind="row")
    try:
        x = noise(5, 8)
        torch.testing.assert_close(row.function(x), centred(x))
    finally:
        unregister_op("centred")


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("bump", BUMP, "slope / (1 + x)"), {}, r"'bump': its expression gives .* at x=.*where its function gives"),
        (("bump", BUMP, "slope / (1 + y)"), {}, "'bump': its expression .*cannot be evaluated: NameError"),
        (("bump", BUMP, "slope /"), {}, "'bump': its expression .*cannot be evaluated: SyntaxError"),
        (("bump", BUMP, "x"), {"kind": "column"}, "'pointwise' or 'row'"),
        (("silu", BUMP, "slope / (1 + x * x)"), {}, "named 'silu' is in the table already"),
        (("fused.bump", BUMP, "slope / (1 + x * x)"), {}, "cannot be an op's name"),
        (("my add", BUMP, "slope / (1 + x * x)"), {}, "cannot be an op's name"),
        (("plus", torch.ops.aten.add.Tensor, "self + other"), {}, "in the table already, as 'add'"),
        (("scale", lambda x, by: x * by, "x * by"), {"probe": {"by": "three"}}, "does not take float32 probes"),
        (("pair", lambda x: (x, x), "x"), {}, "gives a tuple"),
    ],
)
def test_ops_that_are_refused(arguments, options, message):
    with pytest.raises(CaptureError, match=message):
        register_op(*arguments, **options)
    with pytest.raises(CaptureError, match="no op named"):
        unregister_op("bump")


def test_an_op_twice(bump_op):
    with pytest.raises(CaptureError, match="in the table already"):
        register_op("bump", BUMP, "slope / (1 + x * x)")


# --- a spelling


@pytest.fixture
def soft_step():
    def soft_step(x, scale=1.0):
        return 0.5 * (1 + torch.tanh(x * scale))

    register_op("soft_step", soft_step, "0.5 * (1 + tanh(x * scale))")

    @spelling("soft_step")
    def by_sigmoid(x, scale=1.0):
        return (torch.tanh(x * scale) + 1) * 0.5

    @spelling("soft_step")
    def by_division(x, scale=1.0):
        return (torch.tanh(x * scale) + 1) / 2

    yield soft_step
    unregister_spelling(by_sigmoid)
    unregister_spelling(by_division)
    unregister_op("soft_step")


@pytest.mark.parametrize("code", [lambda x: (torch.tanh(x * 3) + 1) * 0.5, lambda x: (1 + torch.tanh(x * 3)) / 2])
def test_a_spelling_becomes_the_op(soft_step, code):
    fused = fuse(graph_of(code, noise(16, 8)), ALWAYS)
    (region,) = fused.regions
    (node,) = region.body.nodes
    assert (node.op_type, node.attr("scale")) == ("soft_step", 3)
    x = noise(16, 8, seed=1)
    torch.testing.assert_close(fused(x), code(x))


def test_something_else_does_not(soft_step):
    fused = fuse(graph_of(lambda x: (torch.tanh(x * 3) + 1) * 0.25, noise(16, 8)), ALWAYS)
    assert all(node.op_type != "soft_step" for region in fused.regions for node in region.body.nodes)


def test_spellings_that_are_refused():
    with pytest.raises(CaptureError, match="no op named 'nowhere'"):
        spelling("nowhere")(lambda x: x + 1)
    with pytest.raises(CaptureError, match="is not a spelling"):
        unregister_spelling(lambda x: x)


# --- a pattern


def test_a_pattern():
    registry = PatternRegistry(DEFAULT)

    @pattern("sine_gate", registry=registry)
    def sine_gate(gate, up):
        return torch.sin(gate).pow(2) * up

    graph = graph_of(lambda a, b: torch.sin(a).pow(2) * b, noise(32, 8), noise(32, 8, seed=1))
    fused = fuse(graph, dataclasses.replace(ALWAYS, patterns=tuple(registry)))
    assert [node.op_type for node in fused.subgraph] == ["fused.sine_gate"]
    near = graph_of(lambda a, b: torch.sin(a).pow(3) * b, noise(32, 8), noise(32, 8, seed=1))
    other = fuse(near, dataclasses.replace(ALWAYS, patterns=tuple(registry)))
    assert "fused.sine_gate" not in [node.op_type for node in other.subgraph]
    with pytest.raises(CaptureError, match="'sine_gate' is registered already"):
        pattern("sine_gate", registry=registry)(lambda gate, up: gate * up)


# --- a target


@dataclasses.dataclass(frozen=True)
class Body:
    """A spec that is the region itself."""

    graph: SubGraph
    metas: tuple[TensorMeta, ...]

    def _operands(self, names):
        return tuple(Operand(name, dict(zip(self._names, self.metas, strict=True))[name].dtype) for name in names)

    @property
    def _names(self):
        return (*self.graph.input_names, *self.graph.output_names)

    @property
    def inputs(self):
        return self._operands(self.graph.input_names)

    @property
    def outputs(self):
        return self._operands(self.graph.output_names)

    def allocate(self, inputs):
        return [torch.empty_like(tensor) for tensor in interpret(self.graph, list(inputs))]


class Tiny(Target):
    """Runs a region's body, op by op."""

    name = "tiny"

    def __init__(self):
        self.launches = 0

    def available(self, device, cache=None):
        return None if device.type == "cpu" else "it runs on the CPU"

    def check_ops(self, graph):
        pass

    def lower(self, graph, values, define=None):
        return Body(graph, tuple(values[name] for name in (*graph.input_names, *graph.output_names)))

    def accept(self, spec):
        if any(node.op_type == "gelu" for node in spec.graph):
            raise FusionError("it has no gelu")

    def source(self, spec):
        return str(spec.graph)

    def build(self, spec, kernel_name, cache=None):
        count = len(spec.graph.input_names)

        def bind(tensors, choice):
            def launch():
                self.launches += 1
                for output, result in zip(tensors[count:], interpret(spec.graph, list(tensors[:count])), strict=True):
                    output.copy_(result)

            return launch

        return bind


@pytest.fixture
def tiny():
    yield register_target(Tiny())
    unregister_target("tiny")


def test_a_target(tiny):
    config = dataclasses.replace(ALWAYS, target="tiny")
    graph = graph_of(lambda x: F.silu(x * 2) + 1, noise(8, 4))
    fused = fuse(graph, config)
    (region,) = fused.regions
    assert region.decision
    assert region.source == str(region.body)
    for seed in range(3):
        x = noise(8, 4, seed=seed)
        torch.testing.assert_close(fused(x), F.silu(x * 2) + 1)
    assert tiny.launches >= 3


def test_what_a_target_refuses_stays_as_it_is(tiny):
    config = dataclasses.replace(ALWAYS, target="tiny")
    fused = fuse(graph_of(lambda a, b: F.gelu(a) * b, *two()), config)
    assert not fused.regions
    assert "the target 'tiny' refuses it: it has no gelu" in str(fused.explain())


@pytest.mark.parametrize("method", ["available", "lower", "accept", "source", "build"])
def test_a_target_that_raises_is_named(tiny, method, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("out of luck")

    monkeypatch.setattr(tiny, method, broken)
    fused = fuse(graph_of(swiglu, *two()), dataclasses.replace(ALWAYS, target="tiny"))
    assert torch.equal(fused(*two()), swiglu(*two()))
    reasons = f"{fused.explain()}{[region.decision for region in fused.regions]}"
    assert "the target 'tiny' raised ZeroDivisionError: out of luck" in reasons


def test_a_refusal_names_the_target(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "available", lambda device, cache=None: "it is on holiday")
    fused = fuse(graph_of(swiglu, *two()), dataclasses.replace(ALWAYS, target="tiny"))
    (region,) = fused.regions
    assert "the target 'tiny' is not available: it is on holiday" in region.decision.reason


def test_targets_that_are_refused(tiny):
    with pytest.raises(CaptureError, match="'tiny' is registered already"):
        register_target(Tiny())
    with pytest.raises(CaptureError, match="not a function"):
        register_target(lambda: None)
    with pytest.raises(CaptureError, match="no target 'huge'"):
        unregister_target("huge")
    with pytest.raises(ValueError, match="'auto', 'ninetoothed', 'c', 'tiny'"):
        FusionConfig(target="huge")


# --- an architecture


def test_an_architecture():
    register_architecture(
        "mine",
        "Qwen2",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
    )
    try:
        engine = InferEngine("mine", dtype=torch.float32, config=FusionConfig(enable_fusion=False))
        assert type(engine.model).__name__ == "Qwen2ForCausalLM"
        with pytest.raises(CaptureError, match="'mine' is registered already"):
            register_architecture("mine", "Llama")
    finally:
        unregister_architecture("mine")
    with pytest.raises(CaptureError, match="no architecture 'Nonsense'"):
        register_architecture("other", "Nonsense")
