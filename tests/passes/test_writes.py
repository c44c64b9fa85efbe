"""Copies that only say where a result is to lie: which go, which must stay, and that nobody can tell, bit for bit."""

import pytest
import torch

from graph_capture.passes.writes import forward_writes
from tests.beside_eager import beside_eager
from tests.passes.test_cleanup import X, cleaned, recorded

COPY = "aten.copy_.default"


def left(function, *args):
    return cleaned(function, forward_writes, *args)


def test_a_sum_in_place_is_a_sum():
    def program(x):
        hidden = x.sin()
        hidden.copy_(hidden + x)
        return hidden.exp()

    assert left(program) == ["sin", "add", "exp"]


def test_a_chain_of_them():
    def program(x):
        hidden = x.sin()
        for _ in range(3):
            hidden.copy_(hidden * x)
        return hidden

    assert left(program) == ["sin", "mul", "mul", "mul"]


def test_through_a_view_that_is_read_through_views():
    def program(x):
        flat = x.sin().view(12, 8)
        flat.copy_(flat.cos())
        return flat.view(3, 32)[1:].exp()

    assert COPY not in left(program)


def test_a_part_that_alone_is_read_afterwards():
    def program(x):
        whole = torch.empty(6, 4, 8)
        part = whole[1:4]
        part.copy_(x.sin())
        return part.exp()

    assert COPY not in left(program)


def test_another_layout_becomes_a_copy_of_its_own():
    def program(x):
        made = torch.empty(8, 4)
        made.copy_(x[0].sin().t())
        return made.view(32).exp(), made

    assert left(program) == ["aten.empty.memory_format", "aten.select.int", "sin", "aten.t.default"] + [
        "aten.clone.default",
        "aten.view.default",
        "exp",
    ]


IN_PLACE = {
    "relu": (lambda x, y: x.sin().relu_().exp(), ["sin", "relu", "exp"]),
    "a residual": (lambda x, y: (x.sin().add_(y, alpha=2).relu_(),), ["sin", "add", "relu"]),
    "a view of it": (lambda x, y: x.sin().view(12, 8).mul_(3).neg(), ["sin", "aten.view.default", "mul", "neg"]),
    "a copy": (lambda x, y: x.clone().clamp_(0, 1), ["aten.clone.default", "clamp"]),
    "an alias is read": (lambda x, y: _with_alias(x.sin()), ["sin", "aten.view.default", "aten.relu_.default", "exp"]),
    "an argument": (lambda x, y: x.relu_().exp(), ["aten.relu_.default", "exp"]),
    "a part": (lambda x, y: _part(x.sin()), ["sin", "aten.select.int", "aten.relu_.default", "exp"]),
    "another dtype": (lambda x, y: y.long().mul_(True).add_(y.int()), ["cast", "mul", "cast", "add"]),
    "its input is read before": (lambda x, y: _before(x.sin()), ["sin", "exp", "relu", "add"]),
}


def _with_alias(made):
    alias = made.view(-1)
    made.relu_()
    return alias.exp()


def _part(made):
    made[0].relu_()
    return made.exp()


def _before(made):
    raised = made.exp()
    return made.relu_() + raised


@pytest.mark.parametrize("what", IN_PLACE)
def test_pointwise_ops_in_place_get_memory_of_their_own(what):
    function, ops = IN_PLACE[what]
    assert left(function, X, X.flip(0).clone()) == ops
    beside_eager(function, X, X.flip(0).clone())


STAYS = {
    "the whole is read": lambda x, y: _part_of(x.sin(), lambda whole, part: (whole.exp(),)),
    "the whole is returned": lambda x, y: _part_of(x.sin(), lambda whole, part: (whole, part)),
    "another view is read": lambda x, y: _part_of(x.sin(), lambda whole, part: (whole[0].exp(), part)),
    "an argument is written": lambda x, y: (x.copy_(y.sin()), x.exp()),
    "the source is an argument, and the result leaves": lambda x, y: x.sin().copy_(y),
    "the source leaves too": lambda x, y: _from_made(y.sin(), lambda made, source: (made, source)),
    "the source is written later": lambda x, y: _from_made(
        y.sin(), lambda made, source: (source.cumsum_(0), made.exp())
    ),
    "the argument behind it is written later": lambda x, y: _from_made(y, lambda made, source: (y.add_(1), made.exp())),
    "the source is a part of the target": lambda x, y: _onto_itself(x.sin()),
    "the source is broadcast": lambda x, y: x.sin().copy_(y[:1]).exp(),
    "it casts": lambda x, y: torch.empty(3, 4, 8, dtype=torch.float64).copy_(x).exp(),
    "it is written again in place": lambda x, y: x.sin().copy_(y.cos()).cumsum_(0).exp(),
}


def _part_of(whole, use):
    part = whole[1:]
    part.copy_(part.cos())
    return use(whole, part)


def _from_made(source, use):
    made = torch.empty(3, 4, 8)
    made.copy_(source)
    return use(made, source)


def _onto_itself(made):
    made[:1].copy_(made[1:2])
    return made.exp()


@pytest.mark.parametrize("what", STAYS)
def test_what_somebody_could_tell_stays(what):
    assert {COPY, "aten.clone.default"} & set(left(STAYS[what], X, X.flip(0).clone()))


def test_one_source_for_two_results_gives_two_memories():
    def program(x):
        source = x.sin()
        first, second = torch.empty(3, 4, 8), torch.empty(3, 4, 8)
        first.copy_(source)
        second.copy_(source)
        return first, second

    graph = forward_writes(recorded(program, X.clone()).subgraph)
    storages = {graph.values[name].storage for name in graph.output_names}
    assert len(storages) == 2
    left(program)
