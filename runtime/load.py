"""Loading a program that `FusedGraph.save` has written.

Everything in the file is checked: the text and each tensor against a digest, names of ops against the op table and
ATen, layouts against the tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from graph_capture.cache import environment_key
from graph_capture.errors import CacheError, FusionError
from graph_capture.ir.graph import OpNode, SubGraph
from graph_capture.ir.graph_json import Decoder, as_dict, as_list, text
from graph_capture.ir.ops import FUSED
from graph_capture.ir.values import TensorMeta
from graph_capture.passes.convolutions import is_ready, ready_convolution
from graph_capture.passes.decode import is_merged
from graph_capture.passes.linears import merged_linears
from graph_capture.passes.pipeline import Rewritten
from graph_capture.passes.receipts import Receipt
from graph_capture.passes.region_bodies import region_body, rounded_outputs
from graph_capture.passes.rewrite import body_of, values_of
from graph_capture.passes.spellings import respelled
from graph_capture.record.guards import Guards
from graph_capture.record.recorded import RecordedGraph
from graph_capture.runtime.config import FusionConfig
from graph_capture.runtime.decide.heuristics import FusionHeuristics
from graph_capture.runtime.decide.whole import device_of
from graph_capture.runtime.fuse import decide_region, merged_kernel
from graph_capture.runtime.fused import FusedGraph
from graph_capture.runtime.library import LibraryKernel
from graph_capture.runtime.program import Program
from graph_capture.runtime.region import Decision, Region
from graph_capture.runtime.save.structure_json import decode_structure
from graph_capture.runtime.save.tensor_file import decode_tensors
from graph_capture.runtime.save.write import DIGEST, ENTRY, FORMAT

Weights = torch.nn.Module | Mapping[str, torch.Tensor]


def load(
    path: str | os.PathLike[str], weights: Weights | None = None, config: FusionConfig | None = None
) -> FusedGraph:
    """A fused graph that `FusedGraph.save` has written; it replays without the model's code.

    Decisions are taken over on the kind of machine, and with the versions, that they were made with; elsewhere regions
    are decided anew, at the first replay: loading runs nothing that the file names. Kernels come from the disk cache,
    or are compiled.

    Args:
        path: the file.
        weights: a module, or tensors by name, to take the place of those in the file with these names; they are used by
            reference. Needed for what was left out by ``save(weights=False)``.
        config: how regions are decided, and how the graph replays.

    Raises:
        CacheError: the file cannot be read, is damaged, was not made by `save`, or lacks a weight that is not given
            either; or a given weight has another shape, dtype, strides or device.
    """
    try:
        content, tensors = _read(path)
        return _decode(as_dict(json.loads(content)), tensors, _by_name(weights), config or FusionConfig())
    except CacheError as error:
        raise CacheError(f"{path}: {error}") from error
    except (OSError, MemoryError) as error:
        raise CacheError(f"{path} cannot be loaded: {error}") from error
    except Exception as error:  # whatever nonsense leads to
        raise CacheError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _read(path: str | os.PathLike[str]) -> tuple[str, Any]:
    """The JSON text and the open file of tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt", device="cpu")
        metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CacheError(f"not a safetensors file, or a damaged one: {error}") from error
    content = metadata.get(ENTRY)
    if content is None:
        raise CacheError("it holds no graph")
    if hashlib.sha256(content.encode()).hexdigest() != metadata.get(DIGEST):
        raise CacheError("its graph is damaged")
    return content, file


def _by_name(weights: Weights | None) -> Mapping[str, torch.Tensor]:
    if isinstance(weights, torch.nn.Module):
        return dict([*weights.named_parameters(remove_duplicate=False), *weights.named_buffers(remove_duplicate=False)])
    return weights or {}


def _decode(table: Mapping[str, Any], file: Any, given: Mapping[str, torch.Tensor], config: FusionConfig) -> FusedGraph:
    if table.get("format") != FORMAT:
        raise CacheError(f"its format is {str(table.get('format'))[:20]}, this version reads {FORMAT}")
    decoder = Decoder(table.get("nodes"))
    recorded, rewritten, constants = (decoder.graph(table.get(key)) for key in ("recorded", "rewritten", "constants"))
    signature, template = decode_structure(table.get("structure"))
    captured = decode_tensors(as_dict(table.get("captured")), file, given, recorded)
    _check(recorded.input_names == (*signature.names, *captured), "the graph has other inputs than its signature")
    for name, meta in zip(signature.names, signature.metas, strict=True):
        _check(recorded.values.get(name) == meta._replace(storage=recorded.values[name].storage), f"{name} is damaged")
    _check(len(recorded.output_names) == len(template.tensors), "the graph has other outputs than its result")
    _check(set(constants.input_names) <= set(captured), "constants depend on more than captured tensors")
    _check(rewritten.input_names == (*recorded.input_names, *constants.output_names), "the fused graph does not fit")
    _check(len(rewritten.output_names) == len(recorded.output_names), "the fused graph has other outputs")
    for part in (recorded, rewritten, constants):
        _check_values(part)
    graph = RecordedGraph(recorded, signature, template, captured, Guards(captured))
    same = table.get("environment") == environment_key(device_of(recorded))
    regions = _RegionDecoder(decoder, rewritten, FusionHeuristics(config), same)
    for part in (rewritten, constants):
        regions.spelled.check(part.nodes, part.values)
    found = tuple(map(regions.decode, as_list(table.get("regions"))))
    receipts = tuple(map(_receipt, as_list(table.get("receipts"))))
    whole = None if table.get("whole") is None or not same else _decode_decision(table["whole"])
    program = Program(graph, Rewritten(rewritten, constants, receipts, ()), found, config, whole)
    fused = FusedGraph(program)
    if regions.undecided:
        fused.decide_later(regions.decide)
    return fused


def _receipt(value: Any) -> Receipt:
    rule, candidates, matches, ops, spelling = as_list(value, 5)
    _check(all(type(count) is int for count in (candidates, matches, ops)), "a receipt is damaged")
    _check(type(spelling) is bool, "a receipt is damaged")
    return Receipt(text(rule), candidates, matches, ops=ops, spelling=spelling)


def _check(condition: bool, what: str) -> None:
    if not condition:
        raise CacheError(what)


def _check_values(graph: SubGraph) -> None:
    """Every value that a node reads or makes has a layout."""
    names = {name for node in graph.nodes for name in (*node.inputs, *node.outputs)}
    _check(names <= graph.values.keys(), "values without a layout")


def _check_origin(node: OpNode, values: Mapping[str, TensorMeta]) -> None:
    """A region's kernel and its recorded ops are made of the same nodes.

    Raises:
        CaptureError: they are not, or these are no graph.
    """
    members = SubGraph(node.origin, node.inputs, node.outputs, values_of(node.origin, values))
    SubGraph(node.recorded, node.inputs, node.outputs)
    if is_merged(node) or is_ready(node):
        make = merged_linears if is_merged(node) else ready_convolution
        made = make(members, list(range(len(members))))
        same = (made.attr("body"), made.inputs) == (node.attr("body"), node.inputs)
    else:
        same = region_body(node.origin, node.outputs, values, rounded_outputs(node)) == (node.attr("body"), node.inputs)
    _check(same, f"{node.op_type} is not made of the ops that it stands for")


class _Spelled:
    """Looks at ops that stand for others; those that are alike once."""

    def __init__(self) -> None:
        self.known: set[object] = set()

    def check(self, nodes: Iterable[OpNode], values: Mapping[str, TensorMeta]) -> None:
        """Each op that took the place of others is what the rules make of these.

        Raises:
            CacheError: one is not.
        """
        for node in nodes:
            if node.origin and not node.op_type.startswith(FUSED):
                made = {name for inner in node.origin for name in inner.outputs}
                read = dict.fromkeys(name for inner in node.origin for name in inner.inputs if name not in made)
                _check(set(node.inputs) <= read.keys() and len(node.outputs) == 1, f"{node.op_type} reads other values")
                origin = SubGraph(node.origin, tuple(read), node.outputs, values_of(node.origin, values))
                body, inputs = body_of(origin, range(len(origin)), node.outputs)
                places = tuple(inputs.index(name) for name in node.inputs)
                form = (body, tuple(values[name][:3] for name in inputs), node.op_type, places, repr(node.attrs))
                if form not in self.known:
                    _check(respelled(origin, node.op_type) == node, f"{node.op_type} is not what it stands for")
                    self.known.add(form)
            self.check(node.origin, values)


def _decode_decision(value: Any) -> Decision:
    table = as_dict(value)
    before, after = table.get("t_fallback"), table.get("t_fused")
    _check(all(time is None or isinstance(time, float) for time in (before, after)), "a decision's times are damaged")
    choice = table.get("choice", 0)
    _check(isinstance(choice, int) and choice >= 0, "a decision's choice is damaged")
    return Decision(bool(table.get("use")), text(table.get("reason")), before, after, cached=True, choice=choice)


class _RegionDecoder:
    """Regions back from JSON."""

    def __init__(self, decoder: Decoder, graph: SubGraph, heuristics: FusionHeuristics, same: bool) -> None:
        self.decoder, self.values, self.heuristics, self.same = decoder, graph.values, heuristics, same
        self.spelled = _Spelled()
        self.undecided: dict[str, LibraryKernel | None] = {}  # region -> the library calls that it may be, if any

    def decide(self, program: Program) -> Program:
        """A program whose regions are decided as is best on this machine: their ops run, to be timed."""
        regions = []
        for region in program.regions:
            if region.name in self.undecided:
                library = self.undecided[region.name]
                region = decide_region(self.heuristics, region, [] if library is None else [library])
            regions.append(region)
        return replace(program, regions=tuple(regions))

    def decode(self, value: Any) -> Region:
        table = as_dict(value)
        node = self.decoder.node(table.get("node"))
        _check(node.op_type.startswith(FUSED), f"{node.op_type} is not a region")
        body: SubGraph = node.attr("body")
        _check(len(body.input_names) == len(node.inputs), "a region has other inputs than its body")
        _check(len(body.output_names) == len(node.outputs), "a region has other outputs than its body")
        _check({*node.inputs, *node.outputs} <= self.values.keys(), "a region's values have no layouts")
        # Code is generated from these names.
        names = {*body.input_names, *(name for inner in body.nodes for name in inner.outputs)}
        _check(
            all(re.fullmatch(r"[A-Za-z_]\w{0,60}", name, re.ASCII) for name in names), "a region's names are damaged"
        )
        _check_origin(node, self.values)
        parts = None if table.get("parts") is None else self.decoder.graph(table["parts"])
        if parts is not None:
            leaves = {leaf.outputs: leaf for inner in parts.nodes for leaf in inner.recorded}
            ends = parts.input_names == node.inputs and parts.output_names == node.outputs
            _check(ends and leaves == {leaf.outputs: leaf for leaf in node.recorded}, "a region has other parts")
            self.spelled.check(parts.nodes, parts.values)
        kind = table.get("kernel")
        library = None
        if kind in ("library", "merged"):
            product = merged_kernel(self.heuristics, node, self.values) if kind == "merged" else None
            library = LibraryKernel(body, tuple(map(text, as_list(table.get("weights")))), product)
        decision = _decode_decision(table.get("decision"))
        region = Region(text(table.get("name")), node, self.values, decision, library, parts, text(table.get("parent")))
        if kind is None or (library is not None and self.same):
            return region
        if self.same:
            return self._compiled(region)
        _check(region.name not in self.undecided, f"there are two regions {region.name}")
        self.undecided[region.name] = library
        return replace(region, decision=Decision(False, "is decided at the first replay"), kernel=None)

    def _compiled(self, region: Region) -> Region:
        body, node = region.body, region.node
        metas = {name: self.values[given] for name, given in zip(body.input_names, node.inputs, strict=True)}
        try:
            kernel = self.heuristics.kernel(body, metas).with_choice(region.decision.choice)
            return replace(region, kernel=kernel)
        except FusionError as error:
            return replace(region, decision=Decision(False, f"no kernel: {error}"))
