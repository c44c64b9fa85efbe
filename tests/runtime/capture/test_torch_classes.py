"""What others add to torch's own classes: seen where it is read, and nowhere else."""

import pytest
import torch

from graph_capture import capture, record
from tests.capturing import UNFUSED, X, same


class Asking(torch.nn.Module):
    """Asks for an attribute that there may not be."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(3, 3)

    def forward(self, x):
        return self.inner(x) * getattr(self, "gain", 1.0)


ADDED = {
    "a property before a parameter": (torch.nn.Linear, "weight", property(lambda module: torch.ones(3, 3))),
    "a method of a base": (torch.nn.Linear, "__call__", lambda module, x: x * 3),
    "what the code asks for": (torch.nn.Module, "gain", 5.0),
    "what the code asks for, closer": (torch.nn.Linear, "gain", 5.0),  # of another class: nothing changes
}


@pytest.mark.parametrize("case", ADDED)
def test_what_is_added_to_a_class_of_torch_is_seen_where_it_is_read(case, monkeypatch):
    owner, name, value = ADDED[case]
    model = Asking().eval()
    fast = capture(model, UNFUSED)
    with torch.no_grad():
        same(fast(X), model(X))
        same(fast(X), model(X))
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value, raising=False)
            same(fast(X), model(X))
        same(fast(X), model(X))


def test_helpers_that_other_libraries_add_are_nobodys_concern(monkeypatch):
    model = Asking().eval()
    with torch.no_grad(), record(X) as recording:
        recording.output(model(X))
    monkeypatch.setattr(torch.nn.Module, "smart_helper", lambda module: None, raising=False)
    monkeypatch.setattr(torch.nn.Linear, "another_helper", 3, raising=False)
    same(recording.graph.run(X), model(X))
