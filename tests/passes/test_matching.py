"""Matching and order are networkx's: what is found is what trying everything finds; equal layers are matched once."""

from itertools import permutations, product

import networkx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networkx.algorithms import isomorphism

from graph_capture import record
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.ops import op
from graph_capture.passes import Pattern
from graph_capture.passes.flow import CyclicGroupsError, Dependencies
from graph_capture.passes.match import Match, Matcher
from graph_capture.passes.pattern import Template
from graph_capture.passes.receipts import Tally
from tests.benchmarks.bench_passes import analyse, decode_step


@pytest.fixture
def calls(monkeypatch):
    """What networkx's matcher was asked to find, one entry a call."""
    made = []

    class Counting(isomorphism.DiGraphMatcher):
        def __init__(self, graph, pattern, node_match=None, edge_match=None):
            made.append(pattern)
            assert node_match is not None
            assert edge_match is not None
            super().__init__(graph, pattern, node_match, edge_match)

    monkeypatch.setattr(isomorphism, "DiGraphMatcher", Counting)
    return made


def test_equal_layers_are_matched_once(calls):
    analyse(decode_step(1))  # the patterns are recorded, and matched themselves
    counts, matched = [], []
    for layers in (4, 40):
        calls.clear()
        receipts = {receipt.rule: receipt.matches for receipt in analyse(decode_step(layers)).receipts}
        counts.append(len(calls))
        matched.append((receipts["add_rms_norm"], receipts["rope_cache"], receipts["parallel_linear"]))
    assert matched == [(8, 4, 8), (80, 40, 80)]
    assert 0 < counts[0] == counts[1]


def test_near_misses_of_equal_layers_name_their_own_values():
    def program(x, gates):
        for gate in gates:
            x = torch.relu(torch.nn.functional.silu(torch.exp(gate))) * x
        return x

    x, gates = torch.randn(4, 8), torch.randn(5, 4, 8)
    with record(x, *gates) as recording:
        recording.output(program(x, gates))
    item = Pattern("deep", lambda gate, up: torch.relu(torch.nn.functional.silu(torch.sin(gate))) * up)
    tally = Tally(item.name)
    matcher = Matcher(Dependencies(recording.graph.subgraph))
    assert list(matcher.occurrences(item, tally, set())) == []
    assert [refusal.reason for refusal in tally.refused] == ["expected sin, found exp"] * 5
    assert len({refusal.values for refusal in tally.refused}) == 5


# --- against trying everything

OPS = ("add", "mul", "sub", "exp", "sin")  # two commute, one does not, two have one operand


@st.composite
def graphs(draw, most, inputs):
    """Random graphs over `OPS`; every input is used, and nothing but the last node's result is returned."""
    nodes = []
    names = [f"i{number}" for number in range(inputs)]
    for index in range(draw(st.integers(1, most))):
        op_type = draw(st.sampled_from(OPS))
        count = 1 if op_type in ("exp", "sin") else 2
        operands = tuple(draw(st.sampled_from(names[-5:])) for _ in range(count))
        nodes.append(OpNode(op_type, operands, (f"v{index}",)))
        names.append(f"v{index}")
    read = {name for node in nodes for name in node.inputs}
    return SubGraph(tuple(nodes), tuple(name for name in names[:inputs] if name in read), (nodes[-1].outputs[0],))


def connected(graph):
    edges = [(name, index) for index, node in enumerate(graph.nodes) for name in (*node.inputs, *node.outputs)]
    return networkx.is_connected(networkx.Graph(edges))


def occurs(template, graph, anchor):
    """Whether `template` ends in node `anchor`: all ways to place its ops and to swap operands are tried."""
    places = [place for place in range(len(graph)) if place != anchor]
    for chosen in permutations(places, len(template) - 1):
        pairs = list(zip(template.nodes, [graph.nodes[place] for place in (*chosen, anchor)], strict=True))
        if any(theirs.op_type != ours.op_type for theirs, ours in pairs):
            continue
        made = {name for _, ours in pairs for name in ours.outputs}
        for swaps in product((False, True), repeat=len(pairs)):
            bound = {}
            fits = True
            for (theirs, ours), swap in zip(pairs, swaps, strict=True):
                if swap and not op(ours.op_type).commutative:
                    fits = False
                operands = ours.inputs[::-1] if swap else ours.inputs
                for name, value in zip((*theirs.inputs, *theirs.outputs), (*operands, *ours.outputs), strict=True):
                    fits = fits and bound.setdefault(name, value) == value
            if fits and not any(bound[name] in made for name in template.input_names):
                return True
    return False


@settings(max_examples=300, deadline=None)
@given(graphs(most=3, inputs=3).filter(connected), graphs(most=7, inputs=3))
def test_what_is_found_is_what_trying_everything_finds(pattern, graph):
    matcher, template = Matcher(Dependencies(graph)), Template(pattern)
    for anchor in matcher.anchors(template):
        found = matcher.at(template, anchor)
        assert isinstance(found, Match) == occurs(pattern, graph, anchor), found
    assert not any(
        occurs(pattern, graph, index) for index in range(len(graph)) if index not in matcher.anchors(template)
    )


def test_two_parameters_may_be_one_value_and_one_not_two():
    nodes = (OpNode("mul", ("x", "x"), ("a",)), OpNode("mul", ("a", "y"), ("b",)))
    matcher = Matcher(Dependencies(SubGraph(nodes, ("x", "y"), ("b",))))
    either = Template(SubGraph((OpNode("mul", ("p", "q"), ("r",)),), ("p", "q"), ("r",)))
    square = Template(SubGraph((OpNode("mul", ("p", "p"), ("r",)),), ("p",), ("r",)))
    assert [matcher.at(either, anchor).bindings for anchor in (0, 1)] == [
        {"p": "x", "q": "x", "r": "a"},
        {"p": "a", "q": "y", "r": "b"},
    ]
    assert matcher.at(square, 0).bindings == {"p": "x", "r": "a"}
    assert not isinstance(matcher.at(square, 1), Match)


# --- order


@settings(max_examples=200, deadline=None)
@given(graphs(most=12, inputs=2), st.data())
def test_contracted_groups_are_sorted_as_the_whole_graph_would_be(graph, data):
    dependencies = Dependencies(graph)
    labels = [data.draw(st.integers(0, 6)) for _ in graph.nodes]  # nodes of one label below 3 are a group
    groups = [[index for index, label in enumerate(labels) if label == number] for number in range(3)]
    groups = [group for group in groups if group and dependencies.detour(group) is None]
    owners = {index: group[-1] for group in groups for index in group}
    quotient = networkx.DiGraph()
    quotient.add_nodes_from(owners.get(index, index) for index in range(len(graph)))
    for index, node in enumerate(graph.nodes):
        for before in (graph.producers[name] for name in node.inputs if name in graph.producers):
            if owners.get(before, before) != owners.get(index, index):
                quotient.add_edge(owners.get(before, before), owners.get(index, index))
    if networkx.is_directed_acyclic_graph(quotient):
        assert dependencies.order(groups) == list(networkx.lexicographical_topological_sort(quotient))
    else:
        with pytest.raises(CyclicGroupsError) as caught:
            dependencies.order(groups)
        assert caught.value.nodes & {group[-1] for group in groups}
