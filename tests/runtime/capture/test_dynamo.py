"""``torch.compile(..., backend="graph_capture")``, in torch's own way of testing a backend."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend, same
from torch.nn import functional as F

from graph_capture import CaptureError, FusionConfig, fuse
from graph_capture.runtime.capture import dynamo
from tests import zoo

ALWAYS = {"profile": "always"}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that the backend got."""
    made = []
    init = dynamo.CompiledGraph.__init__

    def noted(self, *args):
        init(self, *args)
        made.append(self)

    monkeypatch.setattr(dynamo.CompiledGraph, "__init__", noted)
    return made


def compiled(function, **options):
    return torch.compile(function, backend="graph_capture", options=ALWAYS, **options)


class Branch(nn.Module):
    def __init__(self, forward, *modules):
        super().__init__()
        self.parts, self.code = nn.ModuleList(modules), forward

    def forward(self, x):
        return self.code(self.parts, x)


MODULES = {
    "linear": nn.Linear(8, 8),
    "mlp": nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)),
    "layer_norm": nn.LayerNorm(8),
    "rms_norm": nn.RMSNorm(8),
    "batch_norm": nn.BatchNorm1d(8),
    "group_norm": nn.GroupNorm(2, 8),
    "softmax": nn.Softmax(-1),
    "prelu": nn.PReLU(),
    "bilinear": Branch(lambda p, x: p[0](x, x), nn.Bilinear(8, 8, 4)),
    "swiglu": Branch(lambda p, x: F.silu(p[0](x)) * p[1](x), nn.Linear(8, 8), nn.Linear(8, 8)),
    "residual": Branch(lambda p, x: p[0](x + p[1](x)), nn.LayerNorm(8), nn.Linear(8, 8)),
    "convolution": Branch(lambda p, x: p[0](x[None])[0], nn.Conv1d(4, 6, 3, padding=1)),
    "views": Branch(lambda p, x: x.view(2, 2, 8).transpose(0, 1).reshape(4, 8)[:, ::2]),
    "tuple": Branch(lambda p, x: (x.sin(), [x.cos(), x + 1])),
    "dictionary": Branch(lambda p, x: {"a": x * 2, "b": x.shape[0]}),
    "alias": Branch(lambda p, x: (x, x.view(-1), x[0])),
    "in place": Branch(lambda p, x: x.clone().mul_(2).add_(1)),
    "no grad": Branch(lambda p, x: torch.where(x > 0, x, x.exp() - 1).cumsum(-1)),
    "attention": Branch(lambda p, x: F.scaled_dot_product_attention(*(3 * [x.view(1, 2, 2, 8)]))),
    "break": Branch(lambda p, x: (torch._dynamo.graph_break(), p[0](x).relu() + 1)[1], nn.Linear(8, 8)),
}


@pytest.mark.parametrize("name", MODULES)
def test_small_modules(name, graphs):
    module, x = MODULES[name].eval(), torch.randn(4, 8)
    counter = CompileCounterWithBackend("graph_capture")
    fast = torch.compile(module, backend=counter)
    with torch.no_grad():
        for _ in range(3):
            assert same(module(x), fast(x), tol=1e-5)
            x = torch.randn(4, 8)
    assert counter.frame_count == len(graphs) >= 1
    assert all(len(graph.captured.graphs) == 1 for graph in graphs)


@pytest.mark.parametrize("name", [*zoo.DECODERS, "bert"])
def test_architectures(name, graphs):
    model = zoo.build(name)
    fast = compiled(model)
    ours = {} if name == "bert" else {"use_cache": False}
    with torch.no_grad():
        for seed in range(3):
            tokens = zoo.ids(6, seed=seed)
            assert same(model(tokens, **ours).logits, fast(tokens, **ours).logits, tol=1e-4)
    assert any(graph.captured.graphs for graph in graphs)


def test_the_backend_is_found_without_importing_us():
    code = (
        "import sys, torch; assert 'graph_capture' in torch._dynamo.list_backends(); "
        "assert 'graph_capture' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_unknown_options_and_modes_are_named():
    for arguments, text in (
        ({"options": {"fusion_ration": 1}}, "has no option 'fusion_ration'.*fusion_ratio"),
        ({"mode": "fastest"}, "there is no mode 'fastest'.*reduce-overhead"),
    ):
        with pytest.raises(CaptureError, match=text):
            dynamo.graph_capture(torch.fx.symbolic_trace(nn.ReLU()), [torch.ones(1)], **arguments)
    fast = torch.compile(nn.ReLU(), backend="graph_capture", mode="reduce-overhead")
    assert torch.equal(fast(torch.ones(2)), torch.ones(2))


def test_parameters_and_buffers_are_read_and_written_where_they_are(graphs):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
            self.tied.weight = self.fc.weight
            self.register_buffer("seen", torch.zeros(4))

        def forward(self, x):
            self.seen.add_(1)
            x.mul_(2)
            return self.tied(self.fc(x)) + self.seen

    model = Counting()
    fast = compiled(model)
    with torch.no_grad():
        for step in range(1, 5):
            model.fc.weight.mul_(1.5)
            x = torch.randn(2, 4)
            mine = x.clone()
            got = fast(mine)
            assert torch.equal(model.seen, torch.full((4,), float(step)))
            model.seen.sub_(1)
            assert same(model(x), got, tol=1e-5)
            assert torch.equal(x, mine)
    assert [len(graph.captured.graphs) for graph in graphs] == [1]
    assert "fc.weight" in graphs[0].captured.graphs[0].recorded.captured


def test_a_dynamic_graph_records_a_shape_the_second_time_and_so_many(graphs, monkeypatch, caplog):
    monkeypatch.setattr(dynamo, "SHAPES", 2)
    model = nn.Sequential(nn.Linear(4, 4), nn.SiLU())
    fast = compiled(model, dynamic=True)
    with torch.no_grad():
        for length in (2, 3, 2, 3, 4, 4, 4, 2):
            x = torch.randn(length, 4)
            assert same(model(x), fast(x), tol=1e-5)
    assert [len(graph.captured.graphs) for graph in graphs] == [2]
    assert [r.getMessage() for r in caplog.records if "other shapes" in r.getMessage()] == [
        f"{graphs[0]} runs as it is where it has been recorded for 2 other shapes"
    ]


def test_numbers_that_change_are_in_the_signature(graphs):
    fast = compiled(lambda x, scale: x.sin() * scale, dynamic=True)
    for scale in (0.5, 0.5, 0.5, 0.25, 0.25, 0.25):
        x = torch.randn(3)
        assert same(x.sin() * scale, fast(x, scale), tol=1e-6)
    assert len(graphs[0].captured.graphs) == 2
    assert not any(fused.recorded.guarded for fused in graphs[0].captured.graphs)


def test_gradients_run_the_graph_as_it_is_and_say_so_once(graphs, caplog):
    model = nn.Linear(4, 1)
    fast = compiled(model)
    for _ in range(3):
        fast(torch.ones(2, 4)).sum().backward()
    assert torch.equal(model.bias.grad, torch.full((1,), 6.0))
    assert graphs[0].captured is None
    assert len([record for record in caplog.records if "gradient" in record.getMessage()]) == 1


def test_what_cannot_be_recorded_runs_once_and_is_named(graphs, caplog, monkeypatch):
    def broken(self, target, args, kwargs):
        if target is torch.cos:
            raise RuntimeError("no rule for it")
        return torch.fx.Interpreter.call_function(self, target, args, kwargs)

    monkeypatch.setattr(dynamo.FxRun, "call_function", broken, raising=False)

    def code(x):
        x.add_(1)
        return torch.cos(x)

    fast, x = compiled(code), torch.zeros(3)
    for step in range(1, 4):
        assert torch.equal(fast(x), torch.full((3,), float(step)).cos())
        assert torch.equal(x, torch.full((3,), float(step)))  # what had been written was undone before it ran again
    told = [record.getMessage() for record in caplog.records if record.name == "graph_capture"]
    assert len(told) == 1
    assert "where cos (" in told[0]
    assert "test_dynamo.py:" in told[0]
    assert "no rule for it" in told[0]


def test_a_graph_of_many_layers_takes_their_parameters_as_arguments(graphs):
    layers = [nn.Linear(4, 4) for _ in range(6)]
    fast = compiled(lambda layer, x: layer(x).relu())
    with torch.no_grad():
        for _ in range(2):
            for layer in layers:
                x = torch.randn(2, 4)
                assert same(layer(x).relu(), fast(layer, x), tol=1e-5)
    assert all(graph.captured is None or len(graph.captured.graphs) <= 1 for graph in graphs)


def test_generate_compiled_with_us_equals_eager(graphs):
    import transformers as hf

    model, tokens = zoo.build("llama"), zoo.ids(6)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    wanted = model.generate(tokens, **settings, disable_compile=True)
    config = hf.CompileConfig(backend="graph_capture", mode="reduce-overhead", fullgraph=False)
    config._compile_all_devices = True  # on a CPU too
    for _ in range(2):
        assert torch.equal(model.generate(tokens, **settings, compile_config=config), wanted)
    assert any(graph.captured is not None and graph.captured.graphs for graph in graphs)


@pytest.mark.parametrize("how", ["fx", "export"])
def test_graphs_of_torch_can_be_fused(how):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.SiLU()).eval()
    x = torch.randn(2, 4)
    with torch.no_grad():
        if how == "fx":
            graph = torch.fx.symbolic_trace(model)
            with pytest.raises(CaptureError, match="example inputs"):
                fuse(graph)
            fused = fuse(graph, FusionConfig(profile="always"), args=(x,))
        else:
            fused = fuse(torch.export.export(model, (x,)), FusionConfig(profile="always"))
        for _ in range(3):
            x = torch.randn(2, 4)
            assert same(model(x), fused(x), tol=1e-5)
    assert {"0.weight", "1.bias"} <= set(fused.recorded.captured)
