"""The many spellings of an op become the one op of the table.

A rule is a row: pattern functions, a guard, the op that replaces them. The node it makes remembers what it replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from graph_capture.passes.match import Match, candidates, match_at
from graph_capture.passes.pattern import Pattern
from graph_capture.passes.rewrite import Contraction, Dependencies, common_source, contract, exposed, recorded_nodes

from graph_capture.graph import OpNode, SubGraph, TensorMeta

_HALVES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Rule:
    """`pattern` becomes one call of op `pattern.name`, its parameters being inputs and its holes attributes.

    `fits` looks at the layouts of the pattern's values; attributes in `ignore` may be anything, so it must make sure of
    them.
    """

    pattern: Pattern
    fits: Callable[[Mapping[str, TensorMeta]], bool]
    ignore: frozenset[str] = frozenset()


def _hugging_face_rms_norm(input: Any, weight: Any, eps: float = 1e-6) -> Any:
    hidden = input.to(torch.float32)
    variance = hidden.pow(2).mean(-1, keepdim=True)
    hidden = hidden * torch.rsqrt(variance + eps)
    return weight * hidden.to(input.dtype)


def _weight_before_cast_rms_norm(input: Any, weight: Any, eps: float = 1e-6) -> Any:
    hidden = input.to(torch.float32)
    variance = hidden.pow(2).mean(-1, keepdim=True)
    return (weight * (hidden * torch.rsqrt(variance + eps))).to(input.dtype)


def _norm_fits(values: Mapping[str, TensorMeta]) -> bool:
    input, weight, output = values["input"], values["weight"], values["output"]
    return (
        weight.shape == input.shape[-1:]
        and output.shape == input.shape
        and input.dtype == output.dtype == weight.dtype
        and input.dtype.is_floating_point
    )


def _linear(input: Any, weight: Any) -> Any:
    return F.linear(input, weight)


def _linear_bias(input: Any, weight: Any, bias: Any) -> Any:
    return F.linear(input, weight, bias)


def _linear_fits(values: Mapping[str, TensorMeta]) -> bool:
    input, weight, bias = values["input"], values["weight"], values.get("bias")
    return (
        len(weight.shape) == 2
        and input.shape[-1] == weight.shape[1]
        and values["output"].shape == (*input.shape[:-1], weight.shape[0])
        and (bias is None or bias.shape == weight.shape[:1])
    )


_VECTOR = ({"weight": (8,)},)
_MATRIX = tuple({"input": shape, "weight": (5, 8), "bias": (5,)} for shape in ((2, 8), (2, 3, 8)))

RULES = (
    Rule(Pattern("rms_norm", _hugging_face_rms_norm, shapes=_VECTOR, dtypes=_HALVES), _norm_fits),
    Rule(Pattern("rms_norm", _weight_before_cast_rms_norm, shapes=_VECTOR, dtypes=_HALVES), _norm_fits),
    Rule(Pattern("linear", _linear, shapes=_MATRIX, keep_whole=False), _linear_fits, frozenset({"size"})),
    Rule(Pattern("linear", _linear_bias, shapes=_MATRIX, keep_whole=False), _linear_fits, frozenset({"size"})),
)


def canonicalize(graph: SubGraph, rules: tuple[Rule, ...] = RULES) -> SubGraph:
    """`graph` with every spelling that a rule knows replaced by its op."""
    for rule in rules:
        graph = _apply(graph, rule)
    return graph


def _apply(graph: SubGraph, rule: Rule) -> SubGraph:
    found: list[Contraction] = []
    taken: set[int] = set()
    dependencies: Dependencies | None = None
    for template in rule.pattern.templates:
        for anchor in candidates(graph, template):
            match = None if anchor in taken else match_at(graph, template, anchor, rule.ignore)
            if match is None or taken & set(match.nodes) or not _fits(graph, rule, match):
                continue
            dependencies = dependencies or Dependencies(graph)
            if dependencies.blocked(match.nodes) is None:
                found.append(_contraction(graph, rule, match))
                taken.update(match.nodes)
    return contract(graph, found, dependencies)[0] if found else graph


def _fits(graph: SubGraph, rule: Rule, match: Match) -> bool:
    output = match.bindings[rule.pattern.outputs[0]]
    if exposed(graph, match.nodes) not in ([output], []):
        return False
    if not all(name in graph.values for name in match.bindings.values()):
        return False
    return rule.fits({name: graph.values[value] for name, value in match.bindings.items()})


def _contraction(graph: SubGraph, rule: Rule, match: Match) -> Contraction:
    nodes = [graph.nodes[index] for index in match.nodes]
    inputs = rule.pattern.templates[0].graph.input_names
    node = OpNode(
        rule.pattern.name,
        tuple(match.bindings[name] for name in inputs),
        (match.bindings[rule.pattern.outputs[0]],),
        tuple(match.holes.items()),
        source=common_source(nodes),
        origin=recorded_nodes(graph, match.nodes),
    )
    return Contraction(match.nodes, node)
